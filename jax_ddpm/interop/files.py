"""Files that are on the disk when a call returns, whole or not at all. Errors name the file."""

import os
from pathlib import Path

__all__ = ["flush_folder", "make_folder", "replace_file", "write_file"]


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file whole or not at all. Raises `OSError`; an older one is then untouched."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        write_file(temporary, data)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_file(path: Path, data: bytes | bytearray, mode: str = "wb") -> None:
    """Write, or append (`"ab"`), and wait for the disk. Raises `OSError`."""
    try:
        with path.open(mode) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


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
