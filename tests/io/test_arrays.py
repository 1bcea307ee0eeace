import numpy as np
import pytest

from jax_ddpm.io.arrays import flatten, load_tensors, save_tensors, unflatten


def test_round_trip_of_arrays_that_are_not_contiguous(tmp_path):
    """safetensors alone would write these as garbage."""
    base = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    tree = {"params": {"a": {"kernel": base.transpose(2, 0, 1)}, "b": base[::-1, ::2]}}
    tree["count"] = np.int32(3)
    save_tensors(tmp_path / "x.safetensors", flatten(tree))
    back = unflatten(load_tensors(tmp_path / "x.safetensors"))
    assert back["count"].shape == () and back["count"] == 3
    np.testing.assert_array_equal(back["params"]["a"]["kernel"], base.transpose(2, 0, 1))
    np.testing.assert_array_equal(back["params"]["b"], base[::-1, ::2])
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match="x.safetensors"):
        load_tensors(path)


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": np.ones(100)})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="x.safetensors"):
        load_tensors(path)


def test_a_kind_of_number_that_is_not_known_is_named(tmp_path):
    path = tmp_path / "x.safetensors"
    save_tensors(path, {"a": np.ones(8, np.uint8)})
    path.write_bytes(path.read_bytes().replace(b'"U8"', b'"F8_E4M3"'.ljust(4), 1))
    header = path.read_bytes()
    size = int.from_bytes(header[:8], "little") + 5
    path.write_bytes(size.to_bytes(8, "little") + header[8:])
    with pytest.raises(ValueError, match="x.safetensors: a: expected one of BF16, .* got F8_E4M3"):
        load_tensors(path)
