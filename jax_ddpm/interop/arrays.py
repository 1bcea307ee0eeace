"""Trees of arrays as one safetensors file, named by their paths: `params/down1/kernel`."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

__all__ = ["load_arrays", "save_arrays"]


def save_arrays(path: str | Path, tree: Mapping[str, Any]) -> None:
    """Write nested dictionaries of arrays, whole or not at all."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    # safetensors writes the buffer as it lies: what is not C-contiguous would be garbage.
    arrays = {name: np.ascontiguousarray(array) for name, array in _flatten(tree).items()}
    save_file(arrays, temporary)
    os.replace(temporary, path)


def load_arrays(path: str | Path) -> dict[str, Any]:
    """Read what `save_arrays` wrote. Raises `ValueError` naming a file that cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a safetensors file, got none")
    try:
        arrays = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: expected a safetensors file, got a damaged one: {error}"
        ) from None
    tree: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array
    return tree


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, np.ndarray]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}/"))
        else:
            flat[prefix + name] = np.asarray(value)
    return flat
