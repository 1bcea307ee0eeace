"""Arrays as a safetensors file, by name; those of a tree by path: `params/down1/kernel`.

safetensors is imported when a file is: the core of the library does without it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._checks import FieldError
from jax_ddpm.io.files import replace_file

__all__ = [
    "check_weights",
    "flatten",
    "from_bytes",
    "load_tensors",
    "save_tensors",
    "to_bytes",
    "unflatten",
]

_DTYPES = {
    "BF16": jnp.bfloat16,  # which safetensors' own reader of bytes does not know
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
    """Write arrays by name, whole or not at all; PyTorch's readers take the file as theirs."""
    check_weights(tensors)
    replace_file(Path(path), to_bytes(tensors))


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Arrays by name, read-only views of the mapped file: what is not used is not read, and who
    changes the file changes them.

    Raises `ValueError` naming a file that cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, got none")
    tensors = {}
    try:
        with safe_open(path, framework="np") as file:
            data = np.asarray(np.memmap(path, np.uint8, mode="r"))
            end = 8 + int.from_bytes(data[:8].tobytes(), "little")  # of the header
            for name in file.offset_keys():  # one after the other, without holes
                entry = file.get_slice(name)
                kind, shape = entry.get_dtype(), entry.get_shape()
                if kind not in _DTYPES:
                    known = ", ".join(_DTYPES)
                    raise ValueError(f"{path}: {name}: expected one of {known}, got {kind}")
                dtype = np.dtype(_DTYPES[kind])
                start, end = end, end + math.prod(shape) * dtype.itemsize
                tensors[name] = data[start:end].view(dtype).reshape(shape)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got a damaged one: {error}"
        ) from None
    return tensors


def to_bytes(tensors: Mapping[str, Any]) -> bytes:
    """A safetensors file of arrays by name."""
    from safetensors.numpy import save

    # safetensors writes the buffer as it lies: what is not C-contiguous would be garbage.
    contiguous = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return save(contiguous, metadata={"format": "pt"})


def from_bytes(data: bytes) -> dict[str, np.ndarray]:
    """What `to_bytes` was given, read-only. Raises `ValueError` for anything else."""
    from safetensors import SafetensorError, deserialize

    try:
        return {
            name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in deserialize(data)
        }
    except (SafetensorError, KeyError, OverflowError) as error:
        raise ValueError(f"no safetensors: {error}") from None


def flatten(tree: Any) -> dict[str, Any]:
    """The leaves of a tree, by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as nested dictionaries."""
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
