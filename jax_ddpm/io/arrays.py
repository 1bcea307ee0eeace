"""Arrays by name in safetensors files, and trees of arrays as names: `params/down1/kernel`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.io.files import replace_file

_DTYPES = {f"{kind}{8 * size}": f"{kind.lower()}{size}" for kind in "IUF" for size in (1, 2, 4, 8)}
_DTYPES |= {"BOOL": "?", "BF16": jnp.bfloat16}


def check_weights(tensors: Mapping[str, Any], what: str = "weights") -> None:
    """Raises `FieldError` if a number is not finite: such weights are never kept."""
    for key, value in tensors.items():
        if not np.all(np.isfinite(value)):
            raise FieldError(None, f"{what}: expected finite numbers, got NaN or infinity in {key}")


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write arrays by name to a safetensors file, which PyTorch can read, whole or not at all."""
    replace_file(Path(path), to_bytes(tensors))


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name: read-only views of the memory-mapped file.

    Raises `ValueError`, naming the file, if it cannot be read.
    """
    try:
        return from_bytes(np.memmap(path, np.uint8, mode="r"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', error)}") from None


def to_bytes(tensors: Mapping[str, Any], what: str = "weights") -> bytes:
    """Arrays by name, of finite numbers, as the content of a safetensors file."""
    from safetensors.numpy import save

    check_weights(tensors, what)
    # safetensors writes the buffer in memory order, so arrays must be C-contiguous.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return save(contiguous, metadata={"format": "pt"})


def from_bytes(content: Any) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name: read-only views of its content, bytes or a buffer.

    Raises `ValueError` unless it is the header's length (8 bytes), the header (JSON), and the data.
    """
    tensors, position = {}, 0
    try:
        content = np.frombuffer(content, np.uint8)
        start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (begin, end), shape = entry["data_offsets"], entry["shape"]
            if begin != position or end < begin or min(shape, default=0) < 0:
                raise ValueError(f"{name}: expected one tensor after the other, got {entry}")
            data = content[start + begin : start + end].view(_DTYPES[entry["dtype"]])
            tensors[name], position = data.reshape(shape), end
        if start + position != len(content):
            raise ValueError(f"expected {start + position} bytes, got {len(content)}")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        kind = type(error).__name__  # whose `repr` may hold the whole file
        raise ValueError(f"expected a readable safetensors file: {kind}: {error}") from None
    return tensors


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path.

    >>> flatten({"params": {"bias": 0, "kernel": 1}})
    {'params/bias': 0, 'params/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree
