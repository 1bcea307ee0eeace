"""The examples of `interop/README.md` with OpenAI's files, run on small networks of their kind.

They are marked `py`: `tests/test_readme.py` runs what needs no files.
"""

import re
from pathlib import Path

import numpy as np
import pytest

import jax_ddpm as ddpm

README = Path(ddpm.__file__).parent / "interop" / "README.md"
SMALLER = {
    "64, 64": "32, 32",
    "--image_size 64": "--image_size 32",
    "--num_channels 192": "--num_channels 32 --channel_mult 1,2",
    "--num_res_blocks 3": "--num_res_blocks 1",
    "--attention_resolutions 32,16,8": "--attention_resolutions 8",
    "--classifier_depth 4": (
        "--classifier_depth 1 --classifier_width 64 --classifier_attention_resolutions 4"
    ),
    "jnp.zeros((2, 32, 32, 3))": "jax.random.uniform(jax.random.key(9), (2, 32, 32, 3)) - 0.2",
    '"ddim25"': '"ddim4"',
    "chain(50)": "chain(20)",
}


@pytest.mark.patience
def test_finetune_guide_and_restore(tmp_path, monkeypatch, defaults, torch):
    from torch_reference.models.openai import Classifier, UNet

    torch.manual_seed(0)
    options = {"head_channels": 64, "classes": 1000, "out_channels": 6, "updown": True}
    unet = UNet(32, (1, 2), 1, (4,), heads=None, **options, new_order=True)
    torch.save(unet.state_dict(), tmp_path / "64x64_diffusion.pt")
    classifier = Classifier(32, 64, (1, 2, 2, 2), 1, (8,))
    torch.save(classifier.state_dict(), tmp_path / "64x64_classifier.pt")
    monkeypatch.chdir(tmp_path)
    namespace = {}
    blocks = re.findall(r"^```py\n(.*?)^```", README.read_text(), re.M | re.S)
    text = "".join(blocks)
    for ours, theirs in SMALLER.items():
        assert ours in text
        text = text.replace(ours, theirs)
    exec(compile(text, str(README), "exec"), namespace)

    assert len(blocks) == 2 and len(blocks[1].splitlines()) < 40
    assert int(namespace["state"].step) == 10 and np.isfinite(namespace["metrics"]["loss"])
    assert np.all(np.isfinite(namespace["samples"]))
    downscale, restored = namespace["downscale"], namespace["restored"]
    off = np.abs(downscale(restored) - namespace["measured"]).mean()
    others = np.abs(downscale(restored[::-1]) - namespace["measured"]).mean()
    assert off < 0.03 and off < others / 2
