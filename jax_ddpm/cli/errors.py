"""Errors and warnings of the command line: one line each, in the words of its flags."""

import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_ddpm._errors import Field, FieldError


class UsageError(Exception):
    """The command cannot be carried out; the message is one line that names the flag."""


@contextmanager
def naming(**flags: str) -> Iterator[None]:
    """Spells the settings in a `FieldError` as flags: `--like-this`, or as `flags` say."""

    def spell(field: Field) -> str:
        flag = flags.get(field.name, "--" + field.name.replace("_", "-"))
        return flag if field.value in (None, True) else f"{flag} {field.value}"

    try:
        yield
    except FieldError as error:
        raise UsageError(error.spelled(spell)) from None


@contextmanager
def warning_lines() -> Iterator[None]:
    """Inside, a warning is a line on the error stream."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"jax-ddpm: {message}", file=sys.stderr)
        yield


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Names the flag of a path that cannot be written."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or error
        raise UsageError(f"{flag}: cannot write {error.filename or path}: {problem}") from None


def check_file(flag: str, path: Path | None, *suffixes: str) -> None:
    """Raises `UsageError` unless `path` is None or can be written: before the work, not after."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{flag}: expected a {' or a '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise UsageError(f"{flag}: expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise UsageError(f"{flag}: no such folder: {path.parent}")
    with writing(flag, path), tempfile.TemporaryFile(dir=path.parent):
        pass
