"""State dicts as they come from PyTorch, without PyTorch."""

from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = ["as_numpy", "check_tensors"]


def as_numpy(value: Any) -> np.ndarray:
    """A copy of a tensor or an array: training on in torch must not change it."""
    # A parameter that tracks gradients refuses NumPy, and this package never imports torch.
    return np.asarray(value.detach() if hasattr(value, "detach") else value).copy()


def check_tensors(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, tuple[int, ...]], owner: str
) -> None:
    """Raises `ValueError` naming the first tensor that is missing, unknown or misshapen."""
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"state_dict: expected a tensor {name}, got none")
        if name not in expected:
            raise ValueError(f"state_dict: expected only {owner} tensors, got {name}")
        if tensors[name].shape != expected[name]:
            raise ValueError(
                f"state_dict: expected {name} of shape {expected[name]}, got {tensors[name].shape}"
            )
