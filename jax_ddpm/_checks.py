"""What is static is checked when a function is called or traced: "expected …, got …"."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

__all__ = ["check_choice", "check_shape"]


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_shape(name: str, value: Any, expected: Sequence[int]) -> None:
    """Raises `ValueError` unless `value` has the shape `expected`."""
    shape = jnp.shape(value)
    if shape != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {shape}")
