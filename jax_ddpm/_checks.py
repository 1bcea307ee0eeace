"""Arguments are checked when a function is called or traced: "expected …, got …"."""

import inspect
from collections.abc import Callable, Sequence
from functools import lru_cache, wraps
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import (
    Any,
    BinaryIO,
    Literal,
    NamedTuple,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import AbstractArray, Key, jaxtyped

__all__ = [
    "Field",
    "FieldError",
    "FieldTypeError",
    "check_between",
    "check_choice",
    "check_finite",
    "check_key",
    "check_not_negative",
    "check_positive",
    "check_shape",
    "check_type",
    "checked",
    "described",
]

P = ParamSpec("P")
R = TypeVar("R")
_ARRAYS = np.ndarray | np.generic | jax.Array


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
        return type(self), (self.field, *self.problem)

    def spelled(self, spell: Callable[[Field], str]) -> str:
        """The message, with the names of settings as `spell` writes them."""
        parts = [spell(each) if isinstance(each, Field) else each for each in self.problem]
        return "".join(parts if self.field is None else [spell(Field(self.field)), ": ", *parts])


class FieldTypeError(FieldError, TypeError):
    """An argument or a setting is of the wrong type."""


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Raises `FieldError` unless `value` is one of `choices`."""
    if value not in choices:
        expected = ", ".join(repr(choice) for choice in choices)
        raise FieldError(name, f"expected one of {expected}, got {value!r}")


def check_key(name: str, value: Any) -> None:
    """Raises `FieldTypeError` unless `value` is a typed key."""
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = type(value).__name__ if dtype is None else f"an array of {dtype}"
        raise FieldTypeError(name, f"expected a typed key, jax.random.key(seed), got {got}")


def check_between(name: str, value: Any, low: int, high: int) -> None:
    """Raises `FieldError` unless a concrete `value`, NaN included, lies in [low, high]."""
    if isinstance(value, Tracer) or np.size(value) == 0:
        return
    value = np.asarray(value)  # before any arithmetic, which a surrounding trace would take over
    least, most = value.min(), value.max()
    if not (low <= least and most <= high):
        ends = [str(x) if isinstance(x, Integral) else f"{x:g}" for x in (least, most)]
        got = " to ".join(dict.fromkeys(ends))
        raise FieldError(name, f"expected values in [{low}, {high}], got {got}")


def check_finite(name: str, value: Any) -> None:
    """Raises `FieldError` unless `value`, where it is concrete, is finite throughout."""
    if not isinstance(value, Tracer) and not np.all(np.isfinite(value)):
        raise FieldError(name, f"expected a finite number, got {value}")


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


def check_not_negative(**values: Any) -> None:
    """Raises `FieldError` unless each of these, where it is concrete, is 0 or more throughout."""
    for name, value in values.items():
        if not isinstance(value, Tracer) and (least := np.min(np.asarray(value), initial=0)) < 0:
            raise FieldError(name, f"expected 0 or more, got {least}")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Checks arguments of a public function against their annotations; whole numbers become `int`.

    Of shapes it checks the rank alone: how arguments fit together, the function says. Raises
    `FieldTypeError`, or `FieldError` where only a rank or a choice is wrong.
    """
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        plain: Callable[..., R] = function
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return inspect.unwrap(plain)(*args, **kwargs)  # Python says what is missing
        for name, value in bound.arguments.items():
            annotation = signature.parameters[name].annotation
            check_type(name, value, annotation)
            if isinstance(value, _ARRAYS) and {*_kinds(annotation)} <= {int, NoneType}:
                bound.arguments[name] = value.item()
        return plain(*bound.args, **bound.kwargs)

    return call


def check_type(name: str, value: Any, annotation: Any) -> None:
    """Raises `FieldError` unless `value` is what `annotation` says."""
    kinds = _kinds(annotation)
    arrays = [kind for kind in kinds if _is_array(kind)]
    with jaxtyped("context"):  # of its own: axes of other arguments may have the same names
        if any(_fits(value, kind) for kind in kinds):
            return
        rank = any(_fits(value, kind.dtype[kind.array_type, "..."]) for kind in arrays)
    choices = [choice for kind in kinds for choice in _choices(kind)]
    if any(kind.dtype is Key for kind in arrays):
        check_key(name, value)
    if rank:
        shapes = " or ".join(dict.fromkeys(map(_axes, arrays)))
        raise FieldError(name, f"expected shape {shapes}, got {list(np.shape(value))}")
    if any(choice is not None for choice in choices):
        raise FieldError(name, f"expected one of {', '.join(map(repr, choices))}, got {value!r}")
    words = dict.fromkeys(map(_words, kinds))
    if "a number" in words:
        words.pop("a whole number", None)
    expected = " or ".join(words)
    raise FieldTypeError(name, f"expected {expected}, got {described(value)}")


@lru_cache
def _kinds(annotation: Any) -> tuple[Any, ...]:
    union = get_origin(annotation) in (Union, UnionType)
    return get_args(annotation) if union else (annotation,)


def _fits(value: Any, kind: Any) -> bool:
    if kind in (Any, inspect.Parameter.empty):
        return True
    if kind in (int, np.integer):
        return _is_number(value, Integral, jnp.integer)
    if kind is float:
        return _is_number(value, Real, jnp.floating) or _is_number(value, Integral, jnp.integer)
    if kind is bool:
        return isinstance(value, bool | np.bool_)
    origin = get_origin(kind) or kind
    if origin is Literal:
        value = value.item() if isinstance(value, np.generic) else value
        return isinstance(value, str | int) and value is not True and value in get_args(kind)
    if origin is Sequence:
        if isinstance(value, np.ndarray | jax.Array):
            return value.ndim == 1 or (value.ndim > 1 and get_args(kind)[0] is not float)
        return isinstance(value, Sequence) and not isinstance(value, str)
    if origin is tuple:
        sizes = isinstance(value, tuple | list) and len(value) == len(get_args(kind))
        return sizes and all(map(_fits, value, get_args(kind)))
    if origin is Callable:
        takes_variables = _is_of_two(kind) and _is_module(getattr(value, "__self__", None))
        return callable(value) and not _is_module(value) and not takes_variables
    if origin is BinaryIO:
        return hasattr(value, "write")
    # A NamedTuple is a contract, which others keep too, such as `optax.MultiSteps`.
    fields = getattr(origin, "_fields", ("",))
    return isinstance(value, origin) or all(hasattr(value, each) for each in fields)


def _is_module(value: Any) -> bool:
    """Whether it is a module of Flax that is not bound, or of torch."""
    unbound = hasattr(value, "apply") and getattr(value, "scope", value) is None
    return unbound or "torch.nn.modules.module" in {each.__module__ for each in type(value).__mro__}


def _is_number(value: Any, kind: type, dtype: Any) -> bool:
    """Whether it is one of Python's, or of NumPy's or JAX's without axes."""
    if isinstance(value, _ARRAYS):
        known = not isinstance(value, Tracer)
        return known and value.ndim == 0 and bool(jnp.issubdtype(value.dtype, dtype))
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_of_two(kind: Any) -> bool:
    """Whether it is a function of (x_t, t)."""
    return len(get_args(kind)) == 2 and get_args(kind)[0] is not ... and len(get_args(kind)[0]) == 2


def _is_array(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, AbstractArray)


def _choices(kind: Any) -> tuple[Any, ...]:
    return (None,) if kind is NoneType else get_args(kind) if get_origin(kind) is Literal else ()


def _axes(kind: Any) -> str:
    names = ("…" if "*" in name or name == "..." else name for name in kind.dim_str.split())
    return f"[{', '.join(names)}]"


def _words(kind: Any) -> str:
    """What an annotation asks for, as words."""
    words = {
        bool: "True or False",
        float: "a number",
        Real: "a number",
        int: "a whole number",
        np.integer: "a whole number",
        NoneType: "None",
        BinaryIO: "a file",
        PathLike: "a path",
        Sequence: "a list",
        str: "a text",
    }
    examples = {
        "Dataset": "load_dataset makes",
        "NoiseSchedule": "make_schedule(betas)",
        "Sampler": "ddim()",
    }
    if get_origin(kind) is Callable:
        if _is_of_two(kind):
            return "a function of (x_t, t), such as lambda x_t, t: model.apply(variables, x_t, t)"
        return "a function, such as model.apply" if get_args(kind)[:1] == (...,) else "a function"
    if get_origin(kind) is tuple:
        return f"({', '.join(map(_words, get_args(kind)))})"
    if not _is_array(kind):
        kind = get_origin(kind) or kind
        example = examples.get(kind.__name__)
        return words.get(kind, f"a {kind.__name__}" + (f", such as {example}" if example else ""))
    name = kind.dtype.__name__
    if kind.dim_str == "":
        return "a whole number" if name == "Integer" else "a number"
    dtypes = {"Float": "a floating", "Integer": "an integer", "Bool": "a boolean"}
    dtype = (dtypes | {"UInt8": "a uint8"}).get(name, "an")
    axes = "" if kind.dim_str == "..." else f" {_axes(kind)}"
    return f"{dtype} array{axes}"


def described(value: Any) -> str:
    """A value in a message: itself, if it is short, or what it is."""
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    if isinstance(value, np.ndarray | jax.Array):
        return f"{value.dtype}{list(value.shape)}"
    kind = type(value)
    if _is_module(value):
        return f"the module {kind.__name__}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    home = kind.__module__.partition(".")[0]
    name = f"a {kind.__name__}" if home == "builtins" else f"a {home}.{kind.__name__}"
    return f"{name}: its .numpy() is an array" if hasattr(value, "numpy") else name
