"""Whatever is in a file: a right result, or one clear error. Never a silent wrong one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jax_ddpm.data import load_dataset
from jax_ddpm.interop import load_diffusers, save_diffusers
from jax_ddpm.io.arrays import flatten, from_bytes, to_bytes, unflatten
from jax_ddpm.io.checkpoint import load_checkpoint, save_checkpoint

calm = settings(deadline=None, max_examples=40, derandomize=True)
names = st.text("abc_é", min_size=1, max_size=4)
arrays = st.builds(
    lambda shape, dtype, order: np.arange(math.prod(shape)).reshape(shape).astype(dtype, order),
    st.lists(st.integers(0, 3), max_size=4),
    st.sampled_from(["float32", "float64", "float16", "int32", "uint8", "bool"]),
    st.sampled_from("CF"),
)
trees = st.recursive(arrays, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3))
edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(max_size=3)), min_size=1)


@calm
@given(trees)
def test_arrays_come_back_to_the_bit(tree):
    expected = flatten({"x": tree})
    back = flatten(unflatten(from_bytes(to_bytes(expected))))
    assert back.keys() == expected.keys()
    for name, array in back.items():
        assert array.dtype == expected[name].dtype and array.shape == expected[name].shape
        assert array.tobytes() == expected[name].tobytes()


@calm
@given(st.integers(0, 2**64 - 1), st.binary(max_size=64))
def test_no_safetensors_is_said_to_be_none(length, header):
    """Among them headers that claim to be as large as memory is not."""
    for content in (header, length.to_bytes(8, "little") + header):
        try:
            from_bytes(content)
        except ValueError as error:
            assert "no safetensors" in str(error)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, write_run, small_unet):
    """One of each: a checkpoint, a folder of diffusers, images."""
    folder = tmp_path_factory.mktemp("files")
    save_checkpoint(folder, 3, {"w": {"a": np.arange(5.0)}}, {"key": [1, 2]})
    run = write_run(folder / "run", small_unet, num_classes=10)
    save_diffusers(folder / "diffusers", run.pretrained)
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 3, 1), np.uint8)
    np.save(folder / "x.npy", images)
    np.savez(folder / "x.npz", images=images, labels=np.arange(4))
    return folder


def falls(pretrained):
    return np.all(np.diff(pretrained.schedule.alphas_cumprod) <= 0)


def in_range(data):
    images = data.images
    return images.ndim == 4 and (images.dtype == np.uint8 or np.max(np.abs(images)) <= 1)


@pytest.mark.parametrize(
    ("name", "load", "makes_sense"),
    [
        ("00000003/manifest.json", load_checkpoint, None),
        ("00000003/state.json", load_checkpoint, None),
        ("00000003/w.safetensors", load_checkpoint, None),
        ("diffusers/unet/config.json", load_diffusers, falls),
        ("diffusers/scheduler/scheduler_config.json", load_diffusers, falls),
        ("diffusers/unet/diffusion_pytorch_model.safetensors", load_diffusers, falls),
        ("x.npy", load_dataset, in_range),
        ("x.npz", load_dataset, in_range),
    ],
)
def test_an_edited_file_is_named_or_makes_sense(untyped, folder, name, load, makes_sense):
    """Bytes put in, taken away or changed at a few places."""
    path = folder / name
    whole = path.read_bytes()
    # Of a network's weights, the header: within the numbers there is nothing to hold on to.
    head = 8 + int.from_bytes(whole[:8], "little") if "diffusion_py" in name else len(whole)

    @calm
    @given(edits)
    def check(edits):
        content = bytearray(whole[:head])
        for place, replacement in edits:
            start = int(place * len(content))
            content[start : start + 1] = replacement
        path.write_bytes(content + whole[head:])
        try:
            loaded = load(folder / name.partition("/")[0])
        except ValueError as error:
            assert str(folder) in str(error) and "\n" not in str(error)
        else:
            assert makes_sense(loaded) if makes_sense else path.read_bytes() == whole

    check()
    path.write_bytes(whole)
