"""Files and folders that appear on the disk whole or not at all. Errors name the file."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


def replace_file(path: Path, data: bytes | bytearray) -> None:
    """Write a file whole or not at all. If this raises `OSError`, an older file is untouched."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file that replaces `path` when the block ends; if the block fails, nothing is left."""
    with _becoming(path) as temporary, _flushed(temporary, "wb") as file:
        yield file


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder that becomes `path`, missing or empty before, when the block ends; if the block
    fails, nothing is left."""
    make_folder(path.parent)
    with _becoming(path) as temporary:
        temporary.mkdir()
        yield temporary
        _flush_folder(temporary)


def write_file(path: Path, data: bytes | bytearray, mode: str = "wb") -> None:
    """Write, or append with `mode="ab"`, and wait for the disk. Raises `OSError`."""
    with _naming(path), _flushed(path, mode) as file:
        file.write(data)


def make_folder(path: Path) -> None:
    """Make a folder and its parents."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _flush_folder(path.parent)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `ValueError`, naming the file, if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", error)
        raise ValueError(f"{path}: expected a JSON file: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all. Raises `OSError`."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    # A lone surrogate, which UTF-8 cannot encode, becomes JSON's own escape.
    replace_file(path, text.encode(errors="backslashreplace"))


@contextmanager
def _becoming(path: Path) -> Iterator[Path]:
    """A hidden path, of a file or a folder, that is renamed to `path` when the block ends."""
    temporary = path.with_name(f".{path.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with _naming(path):
            yield temporary
            os.replace(temporary, path)
            _flush_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)


@contextmanager
def _flushed(path: Path, mode: str) -> Iterator[Any]:
    with path.open(mode) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(path: Path) -> None:
    """Put the renames in a folder on the disk."""
    if os.name != "posix":
        return  # Windows opens no folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # some libraries drop the system's reason
        raise OSError(error.errno, error.strerror or str(error), str(path)) from None
