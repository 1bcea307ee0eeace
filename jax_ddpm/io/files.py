"""Files that are on the disk when a call returns, whole or not at all. Errors name the file."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file whole or not at all. Raises `OSError`; an older one is then untouched."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end; where that fails, nothing is left."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise _naming(error, path) from None
    finally:
        with suppress(OSError):  # it was renamed, or never made
            temporary.unlink()


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path`, new or empty, at the end; where that fails, nothing is left."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        make_folder(temporary)
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError as error:
        raise _naming(error, path) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_file(path: Path, data: bytes | bytearray, mode: str = "wb") -> None:
    """Write, or append (`"ab"`), and wait for the disk. Raises `OSError`."""
    try:
        with path.open(mode) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise _naming(error, path) from None


def make_folder(path: Path) -> None:
    """Make a folder and those above it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        flush_folder(path.parent)


def flush_folder(path: Path) -> None:
    """A rename is on the disk only once its folder is. (Windows does that by itself.)"""
    if os.name == "posix":
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _naming(error: OSError, path: Path) -> OSError:
    # Not every library passes on the reason that the system gave.
    return OSError(error.errno, error.strerror or str(error), str(path))
