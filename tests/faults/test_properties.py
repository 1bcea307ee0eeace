"""Whatever is in a file: a right result, or one clear error. Never a silent wrong one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ddpm.data import load_dataset
from jax_ddpm.interop import load_diffusers, save_diffusers

edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_run, small_unet):
    """A folder of diffusers, and images."""
    folder = tmp_path_factory.mktemp("files")
    run = write_run(folder / "run", small_unet, num_classes=10)
    save_diffusers(folder / "diffusers", run)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 1), np.uint8)
    np.save(folder / "x.npy", images)
    np.savez(folder / "x.npz", images=images, labels=np.arange(4))
    return folder


def load_and_look(path):
    """What is read makes sense: signal that falls, images in their range."""
    if path.is_dir():
        assert np.all(np.diff(load_diffusers(path).schedule.alphas_cumprod) <= 0)
    else:
        images = load_dataset(path).images
        assert images.ndim == 4 and (images.dtype == np.uint8 or np.max(np.abs(images)) <= 1)


FILES = "diffusers/unet/config.json", "diffusers/scheduler/scheduler_config.json"
FILES += "diffusers/unet/diffusion_pytorch_model.safetensors", "x.npy", "x.npz"


@pytest.mark.parametrize("name", FILES)
def test_an_edited_file_is_named_or_makes_sense(untyped, folder, name):
    """Bytes put in, taken away or changed at a few places."""
    path = folder / name
    whole = path.read_bytes()
    # Of a network's weights, the header: within the numbers there is nothing to hold on to.
    head = 8 + int.from_bytes(whole[:8], "little") if "diffusion_py" in name else len(whole)

    @settings(deadline=None, max_examples=40, derandomize=True)
    @given(edits)
    def check(edits):
        content = bytearray(whole[:head])
        for place, replacement in edits:
            start = int(place * len(content))
            content[start : start + 1] = replacement
        path.write_bytes(content + whole[head:])
        try:
            load_and_look(folder / name.partition("/")[0])
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)

    check()
    path.write_bytes(whole)
