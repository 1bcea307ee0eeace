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

_DTYPES = {
    "BF16": jnp.bfloat16,
    "BOOL": bool,
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


def check_weights(tensors: Mapping[str, Any], what: str = "weights") -> None:
    """Raises `FieldError` if a number is not finite: such weights are never kept."""
    for key, value in tensors.items():
        if not np.all(np.isfinite(value)):
            raise FieldError(None, f"{what}: expected finite numbers, got NaN or infinity in {key}")


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write arrays by name to a safetensors file, which PyTorch can read, whole or not at all."""
    check_weights(tensors)
    replace_file(Path(path), to_bytes(tensors))


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name: read-only views of the memory-mapped file.

    Raises `ValueError`, naming the file, if it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, got none")
    try:
        return from_bytes(np.memmap(path, np.uint8, mode="r") if path.stat().st_size else b"")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def to_bytes(tensors: Mapping[str, Any]) -> bytes:
    """Arrays by name as the content of a safetensors file."""
    from safetensors.numpy import save

    # safetensors writes the buffer in memory order, so arrays must be C-contiguous.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return save(contiguous, metadata={"format": "pt"})


def from_bytes(content: Any) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file by name: read-only views of its content, bytes or a buffer.

    The file is the length of the header (8 bytes, little-endian), the header (JSON), and the data
    of the arrays without gaps. Raises `ValueError` for anything else.
    """
    tensors = {}
    try:
        content = np.frombuffer(content, np.uint8)
        place = start = 8 + int.from_bytes(content[:8].tobytes(), "little")
        header = json.loads(content[8:start].tobytes())
        header.pop("__metadata__", None)
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
            if start + begin != place:
                raise ValueError(f"the data of {name} does not follow the data before it")
            if kind not in _DTYPES:
                raise ValueError(f"{name}: expected one of {', '.join(_DTYPES)}, got {kind}")
            data, place = content[place : start + end], start + end
            tensors[name] = data.view(_DTYPES[kind]).reshape(shape)
        if place != len(content):
            raise ValueError(f"expected {place:,} bytes, got {len(content):,}")
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"expected a readable safetensors file: {error}") from None
    return tensors


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by path.

    >>> flatten({"params": {"bias": 0, "kernel": 1}})
    {'params/bias': 0, 'params/kernel': 1}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by path as nested dictionaries. Raises `ValueError` if a leaf is also a folder."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
            if not isinstance(node, dict):
                raise ValueError(f"{path}: expected a folder of arrays, got an array above it")
        node[leaf] = value
    return tree
