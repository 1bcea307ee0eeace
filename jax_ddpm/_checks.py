"""What is static is checked when a function is called or traced: "expected …, got …"."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

__all__ = [
    "Field",
    "FieldError",
    "check_choice",
    "check_key",
    "check_positive",
    "check_range",
    "check_shape",
]


class Field(NamedTuple):
    """A setting that a message mentions, and the value that is meant, if any."""

    name: str
    value: Any = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class FieldError(ValueError):
    """An argument or a setting is wrong: `field` names it, and is None where it is no single one.

    The problem is text, with a `Field` wherever another setting is mentioned: a command line
    spells those as its flags.
    """

    def __init__(self, field: str | None, *problem: str | Field) -> None:
        self.field, self.problem = field, problem
        super().__init__(self.spelled(str))

    def __reduce__(self) -> Any:
        return FieldError, (self.field, *self.problem)

    def spelled(self, spell: Callable[[Field], str]) -> str:
        """The message, with the names of settings as `spell` writes them."""
        parts = [spell(each) if isinstance(each, Field) else each for each in self.problem]
        return "".join(parts if self.field is None else [spell(Field(self.field)), ": ", *parts])


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `FieldError` unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise FieldError(name, f"expected one of {expected}, got {value!r}")


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


def check_positive(**values: Any) -> None:
    """Raises `FieldError` unless each of these is above zero, or None."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise FieldError(name, f"expected more than 0, got {value}")


def check_range(name: str, value: Any, size: int) -> None:
    """Raises `ValueError` unless a concrete `value` lies in 0 … size - 1: JAX would clamp it."""
    if isinstance(value, Tracer) or np.size(value) == 0:
        return
    value = np.asarray(value)  # before any arithmetic, which a surrounding trace would take over
    if value.min() < 0 or value.max() >= size:
        got = value.min() if value.min() < 0 else value.max()
        raise ValueError(f"{name}: expected entries in [0, {size - 1}], got {got}")
