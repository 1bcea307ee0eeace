import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.io.arrays import flatten, from_bytes, load_tensors, save_tensors, to_bytes, unflatten


def test_every_array_comes_back_to_the_bit(tmp_path):
    """Also those that are not contiguous, which safetensors alone would write as garbage."""
    path, base = tmp_path / "x.safetensors", np.arange(24).reshape(2, 3, 4)
    dtypes = (bool, jnp.bfloat16, "f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
    kinds = {np.dtype(dtype).name: base.astype(dtype).transpose(2, 0, 1) for dtype in dtypes}
    tree = {"é": {"kinds": kinds, "turned": base[::-1, ::2]}, "none": base[:0], "one": np.int32(3)}
    save_tensors(path, flatten(tree))
    assert list(tmp_path.iterdir()) == [path]
    for flat in (load_tensors(path), from_bytes(path.read_bytes())):
        jax.tree.map(partial(np.testing.assert_array_equal, strict=True), unflatten(flat), tree)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    """One of them claims a header larger than any memory, one a kind of number nobody knows."""
    path = tmp_path / "x.safetensors"
    for words in ("No such file", "cannot mmap an empty file"):
        with pytest.raises(ValueError, match=f"x.safetensors: {words}"):
            load_tensors(path)
        path.touch()
    for content in (b"no safetensors at all", b"\xff" * 999, to_bytes({"a": np.ones(9)})[:-8]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.safetensors: expected a readable safetensors fil"):
            load_tensors(path)
        with pytest.raises(ValueError, match="^expected a readable safetensors file: .{,150}$"):
            from_bytes(content)
    header = b'{"a": {"dtype": "F8_E4M3", "shape": [8], "data_offsets": [0, 8]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ValueError, match="x.safetensors: .*'F8_E4M3'"):
        load_tensors(path)


@pytest.mark.parametrize("offsets", [(0, 4, 0, 4), (0, 4, 8, 12), (4, 8, 8, 12), (0, 4, 4, -4)])
def test_a_file_that_lies_about_its_offsets_is_refused(offsets):
    """Overlaps, holes, a late start, and an end before the begin."""
    pairs, shape = {"x": offsets[:2], "y": offsets[2:]}, {"dtype": "F32", "shape": [1]}
    header = {name: {**shape, "data_offsets": pair} for name, pair in pairs.items()}
    content = json.dumps(header).encode()
    with pytest.raises(ValueError, match="one tensor after the other|bytes, got"):
        from_bytes(len(content).to_bytes(8, "little") + content + bytes(12))
