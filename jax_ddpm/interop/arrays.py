"""Arrays as a safetensors file, by name; those of a tree by path: `params/down1/kernel`.

safetensors is imported when a file is: the core of the library does without it.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

__all__ = [
    "flatten",
    "load_arrays",
    "load_tensors",
    "save_arrays",
    "save_tensors",
    "unflatten",
]


def save_arrays(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write nested dictionaries of arrays, whole or not at all."""
    save_tensors(path, flatten(tree))


def load_arrays(path: str | Path) -> dict[str, Any]:
    """Read what `save_arrays` wrote. Raises `ValueError` naming a file that cannot be read."""
    return unflatten(load_tensors(path))


def save_tensors(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write arrays by name, whole or not at all; PyTorch's readers take the file as theirs."""
    from safetensors.numpy import save_file

    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    # safetensors writes the buffer as it lies: what is not C-contiguous would be garbage.
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    save_file(contiguous, temporary, metadata={"format": "pt"})
    os.replace(temporary, path)


def load_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read arrays by name. Raises `ValueError` naming a file that cannot be read."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, got none")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got a damaged one: {error}"
        ) from None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, its keys the paths."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Paths as nested dictionaries."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value
    return tree
