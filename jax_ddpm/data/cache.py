"""Decoded pictures on the disk: one raw file of rows, found by its content.

    CACHE/KEY/images.bin     uint8 [image, height, width, channel]
    CACHE/KEY/about.json     its shape, its digest, and what could not be decoded

KEY is a digest of what was read, of how it is prepared, and of Pillow's version. A folder gets its
name only once it is whole: a process that is killed leaves none, and of two that write the same
one, the second takes the first's.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from jax_ddpm.data.pictures import Found, Pictures
from jax_ddpm.data.preparation import Preparation
from jax_ddpm.data.rows import FileRows
from jax_ddpm.io.files import make_folder, read_json, write_json

_VERSION = 3  # of the decoding
_ROWS, _ABOUT = "images.bin", "about.json"


class Cached(NamedTuple):
    """Decoded pictures."""

    images: FileRows
    failed: dict[int, str]
    """Rows of the survey that could not be decoded, and why: they are left out."""
    on_white: int
    """How many had transparent pixels."""


def cached_pictures(
    cache: Path, pictures: Pictures, progress: Callable[[int], None] | None = None
) -> Cached | None:
    """The pictures from the cache, decoded into it if they are not there; None where the disk has
    no room for them. Raises as `Pictures.stream` does, and `OSError`."""
    folder = cache / _key(pictures.found, pictures.preparation)
    if (cached := _open(folder)) is not None:
        return cached
    make_folder(cache)
    if 2 * int(np.prod(pictures.shape)) > shutil.disk_usage(cache).free:
        return None
    with _written(folder) as new:
        _decode_all(new, pictures, progress)
    if (cached := _open(folder)) is None:
        raise OSError(None, "was removed while it was written", str(folder))
    return cached


def _key(found: Found, preparation: Preparation) -> str:
    from PIL import __version__ as pillow

    how = [preparation.image_size, preparation.crop, *found.shape, _VERSION, pillow]
    return hashlib.sha256(f"{found.sha256} {json.dumps(how)}".encode()).hexdigest()[:32]


def _open(folder: Path) -> Cached | None:
    """What is in a folder; None if there are none, or not the bytes that were written."""
    if not folder.exists():
        return None
    try:
        about = read_json(folder / _ABOUT)
        with (folder / _ROWS).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except (FileNotFoundError, ValueError):
        about, digest = {}, "damaged"
    if digest != about.get("sha256"):
        shutil.rmtree(folder, ignore_errors=True)
        return None
    images = FileRows(folder / _ROWS, tuple(about["shape"]))
    return Cached(images, dict(about["failed"]), about["on_white"])


@contextmanager
def _written(folder: Path) -> Iterator[Path]:
    """A new folder that becomes `folder` at the end, unless there is one by then."""
    _remove_leftovers(folder.parent)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder.parent) as name:
        new = Path(name, folder.name)
        new.mkdir()
        with (Path(name) / ".lock").open("w") as lock:
            _hold(lock)
            lock.write("held")
            lock.flush()
            yield new
            try:
                os.rename(new, folder)
            except OSError:
                if not folder.is_dir():
                    raise


def _remove_leftovers(cache: Path) -> None:
    """Those of processes that were killed: their locks were held, and are no longer."""
    for leftover in cache.glob(".new-*"):
        try:
            with (leftover / ".lock").open("r+") as lock:
                if lock.read() and _hold(lock):
                    shutil.rmtree(leftover, ignore_errors=True)
        except OSError:  # one that another process is just making
            continue


def _hold(lock: Any) -> bool:
    """Whether this process holds a lock now, until it closes the file."""
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def _decode_all(folder: Path, pictures: Pictures, progress: Callable[[int], None] | None) -> None:
    """Write every picture to its row. What cannot be decoded leaves none."""
    failed: dict[int, str] = {}
    on_white, (count, *shape) = 0, pictures.shape
    with (folder / _ROWS).open("w+b") as file:
        for row, image, outcome in pictures.stream(progress):
            if isinstance(outcome, str):
                failed[row] = outcome
                continue
            on_white += outcome
            file.seek(row * image.nbytes)
            file.write(image.data)
        kept = pictures.found.without(failed, pictures.encoded.names).kept
        _close_gaps(file, sorted(failed), count, int(np.prod(shape)))
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    about = {"shape": [len(kept), *shape], "sha256": digest, "on_white": on_white}
    write_json(folder / _ABOUT, about | {"failed": list(failed.items())})


def _close_gaps(file: BinaryIO, failed: list[int], count: int, size: int) -> None:
    """Move up the rows that come after failed ones."""
    good = np.delete(np.arange(count), failed).tolist()
    for new, old in enumerate(good):
        if new != old:
            file.seek(old * size)
            row = file.read(size)
            file.seek(new * size)
            file.write(row)
    file.truncate(len(good) * size)
