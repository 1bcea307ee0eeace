"""`jax-ddpm convert`: to diffusers, to PyTorch, from OpenAI, and back, to the bit."""

import json
from pathlib import Path

import equinox as eqx
import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.interop import load_openai
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.models import SimpleUNet

WEIGHTS = "checkpoints/00000000/ema.safetensors"
OPENAI = json.loads((Path(__file__).parents[1] / "interop/openai/unet.json").read_text())["plain"]


@pytest.fixture
def convert(jax_ddpm_here, tmp_path):
    """What it says to do next."""

    def run(*arguments):
        result = jax_ddpm_here("convert", *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        wrote, _, hint = result.stdout.partition("\n\nnext: ")
        assert wrote == f"wrote {arguments[1]}"
        return hint.strip()

    return run


def test_a_run_goes_to_diffusers_and_comes_back(untrained, convert, jax_ddpm_here, tmp_path):
    """And the pictures are the same."""
    run = untrained / "runs/digits"
    hint = convert(str(run), "there", "--to", "diffusers")
    assert hint == "DDPMPipeline.from_pretrained('there').unet(x, t, class_labels=labels)"
    convert("there", "back", "--to", "run")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (run / WEIGHTS).read_bytes()
    flags = "--num 12 --steps 2 --guidance 2 --out".split()
    for source in (["--run", str(run)], ["--pretrained", "there"]):
        result = jax_ddpm_here("sample", *source, *flags, f"x{source[0]}.npz", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, other = (dict(np.load(path)) for path in tmp_path.glob("x*.npz"))
    assert eqx.tree_equal(one, other) and 10 not in one["labels"], "the null label"


@pytest.mark.usefixtures("torch")
def test_the_tutorials_network_and_its_state_dict(convert, write_run, tmp_path):
    import safetensors.torch

    from torch_reference.models.simple_unet import SimpleUNet as TorchUNet

    write_run(tmp_path / "run", SimpleUNet(channels=1))
    assert convert("run", "w.safetensors", "--to", "torch").endswith(", of a SimpleUNet")
    TorchUNet(1).load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    convert("w.safetensors", "back", "--to", "run", "--image-size", "8")
    assert (tmp_path / "back" / WEIGHTS).read_bytes() == (tmp_path / "run" / WEIGHTS).read_bytes()


def test_openais_files(convert, jax_ddpm_here, tmp_path):
    tensors = {name: np.full(shape, 0.5, "f4") for name, shape in OPENAI["shapes"].items()}
    save_tensors(tmp_path / "x.safetensors", tensors)
    flags = " ".join(f"--{name} {value}" for name, value in OPENAI["flags"].items())
    source = ["--openai-flags", flags, "x.safetensors"]
    convert("x.safetensors", "run", "--to", "run", *source[:2])
    run = runs.load_run(tmp_path / "run")
    assert eqx.tree_equal(run.variables, load_openai(tensors, flags).variables)
    result = jax_ddpm_here("convert", *source, "x", "--to", "diffusers", cwd=tmp_path)
    words = "--to diffusers: num_attention_heads: expected None (`UNet2DModel` has no such setting)"
    assert result.returncode == 2 and words in result.stderr
