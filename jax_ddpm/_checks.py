"""What is static is checked when a function is called or traced: "expected …, got …"."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = ["check_choice", "check_key", "check_range", "check_shape"]


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name}: expected one of {expected}, got {value!r}")


def check_key(name: str, value: Any) -> None:
    """Raises `TypeError` unless `value` is a typed key."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = type(value).__name__ if dtype is None else f"an array of {dtype}"
        raise TypeError(f"{name}: expected a typed key, jax.random.key(seed), got {got}")


def check_shape(name: str, value: Any, expected: Sequence[Any]) -> None:
    """Raises `ValueError` unless `value` has the shape `expected`."""
    shape = jnp.shape(value)
    if shape != tuple(expected):
        raise ValueError(f"{name}: expected shape {tuple(expected)}, got {shape}")


def check_range(name: str, value: Any, size: int) -> None:
    """Raises `ValueError` unless a concrete `value` lies in 0 … size - 1: JAX would clamp it."""
    if isinstance(value, Tracer) or np.size(value) == 0:
        return
    value = np.asarray(value)  # before any arithmetic, which a surrounding trace would take over
    if value.min() < 0 or value.max() >= size:
        got = value.min() if value.min() < 0 else value.max()
        raise ValueError(f"{name}: expected entries in [0, {size - 1}], got {got}")
