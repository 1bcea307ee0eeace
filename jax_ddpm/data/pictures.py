"""Bytes to rows: pictures of many sizes and kinds as one indexed set of uint8 images.

    source ─ look ─▶ sizes, channels, digests ─▶ decoded once into the cache, or when needed

Looking fixes what a resumed run must find unchanged: the shape, and a digest of what was read.
The cache keeps

    SET.json           what was found in each picture of a set, by its size and times of change
    KEY/images.npy     uint8 [image, height, width, channel]
    KEY/about.json     what could not be decoded

KEY is a digest of what was read, of how it is prepared, and of Pillow's version.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from tokenize import TokenError
from typing import Any

import numpy as np
import PIL

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data.dataset import Dataset, Preparation
from jax_ddpm.data.decoding import Encoded, Survey, decode, resized_shape, survey
from jax_ddpm.data.files import Files, Unreadable, reason
from jax_ddpm.io.files import make_folder, read_json, replace_file, write_json

Progress = Callable[[str, int, int], Any]

_VERSION = f"5 {PIL.__version__}"  # of the cache, and of the decoding
_LARGEST = 2**34  # bytes of decoded pictures that are kept in the default cache
_AT_ONCE = 64
_LONGEST = 2  # sides of a picture that random windows are cut out of, in image sizes


class Known(dict[str, list[Any]]):
    """By the name of a picture its stamp, its digest and its header."""

    path: Path | None = None  # of the file of the cache that keeps it


class _Changed(FieldError):
    """A picture is not the one that was looked at."""


@contextmanager
def remembered(cache: Path | None, data: str) -> Iterator[Known]:
    """What was found in the files of a set: `look` adds to it, and the cache keeps it."""
    known = Known()
    path = known.path = cache and cache / f"{_hex(f'{_VERSION} {os.path.abspath(data)}')}.json"
    with suppress(OSError, ValueError):
        known.update(json.loads(path.read_bytes()) if path else {})
    before = dict(known)
    try:
        yield known
    except _Changed:  # in spite of its size and times
        known.clear()
        raise
    finally:
        if path and known != before:
            with suppress(OSError):
                make_folder(path.parent)
                replace_file(path, json.dumps(known).encode())


def look(
    files: Files, known: dict[str, list[Any]], progress: Progress, most: int = -1
) -> tuple[dict[str, bytes], dict[str, Survey], dict[str, str]]:
    """By name the digest of each picture, its header, and what is wrong with the others. What is
    not known is read; with `most` so many bytes at most, of what may be something else."""
    names, digests, heads, wrong, unknown = files.names, {}, {}, {}, {}
    for name in names:
        stamp, (was, digest, *head) = files.stamp(name), known.get(name, ("", ""))
        if not stamp or stamp != was:
            unknown[name] = stamp
        else:
            digests[name], heads[name] = bytes.fromhex(digest), Survey(*head)
    first = len(names) - len(unknown)
    progress("reading", first, len(names))
    for done, (name, read) in enumerate(files.stream(unknown, most), first + 1):
        try:
            data = read()
            digests[name] = _digest(data)
            heads[name] = survey(data)
            if len(data) != most:
                known[name] = [unknown[name], digests[name].hex(), *heads[name]]
        except Exception as error:  # Pillow's plugins raise whatever they meet
            wrong[name] = reason(error)  # by another limit, or another Pillow, it may be read
        progress("reading", done, len(names))
    return digests, heads, wrong


@dataclass(frozen=True)
class Pictures:
    """An array of images, uint8 [image, height, width, channel], that are decoded when rows of it
    are asked for. Safe in several threads."""

    files: Files
    digests: Mapping[str, bytes]  # of what each file held when it was looked at
    preparation: Preparation
    image_shape: tuple[int, int, int]
    extents: np.ndarray | None  # of each picture within that shape, int32 [image, 2]
    record: Path | None  # where the cache keeps what was found

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array's."""
        return len(self), *self.image_shape

    def __len__(self) -> int:
        return len(self.files.names)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `FieldError` naming a picture that cannot be decoded."""
        chosen = np.arange(len(self))[rows]
        images = np.empty((chosen.size, *self.image_shape), np.uint8)
        for place, row in enumerate(chosen.ravel().tolist()):
            name = self.files.names[row]
            try:
                images[place], _ = self._decode(row, partial(self.files.read, name))
            except Unreadable as error:
                raise _refused({name: error.reason}) from None
        return images.reshape(*np.shape(chosen), *self.image_shape)

    def some(self, rows: np.ndarray) -> "Pictures":
        """The array of these rows, none of which is decoded yet."""
        extents = None if self.extents is None else self.extents[rows]
        files = self.files.only([self.files.names[row] for row in rows])
        return replace(self, files=files, extents=extents)

    def decode_all(
        self, write: Callable[[int, np.ndarray], Any], progress: Progress
    ) -> tuple[dict[int, str], int]:
        """Decode each picture by all cores, and give its row and its pixels to `write`. Returns why
        others cannot be decoded, by their rows, and how many had transparent pixels."""
        row_of = {name: row for row, name in enumerate(self.files.names)}
        failed, on_white, done = {}, 0, 0
        pictures = self.files.stream(row_of)
        with ThreadPoolExecutor() as threads:
            while block := list(islice(pictures, _AT_ONCE)):
                tasks = [threads.submit(self._decode, row_of[name], read) for name, read in block]
                for (name, _), task in zip(block, tasks, strict=True):
                    try:
                        image, transparent = task.result()
                    except Unreadable as error:
                        failed[row_of[name]] = error.reason
                    else:
                        write(row_of[name], image)
                        on_white += transparent
                done += len(block)
                progress("decoding", done, len(self))
        return failed, on_white

    def _decode(self, row: int, read: Callable[[], Encoded]) -> tuple[np.ndarray, bool]:
        """A picture, or the middle of it if it is larger, and whether any of it was transparent.
        Raises `Unreadable`, and `FieldError` if it is not what was looked at."""
        name, (height, width, channels) = self.files.names[row], self.image_shape
        try:
            data = read()
        except ValueError as error:
            raise FieldError("data", f"cannot read {name}: {reason(error)}") from None
        if _digest(data) != self.digests[name]:
            with suppress(OSError):
                if self.record is not None:  # which would end every start
                    self.record.unlink()
            raise _Changed("data", f"{name} has changed since it was first read")
        try:
            pixels, on_white = decode(data, channels, self.preparation)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # Pillow's plugins raise whatever they meet
            raise Unreadable(name, reason(error)) from None
        top, left = max(0, pixels.shape[0] - height) // 2, max(0, pixels.shape[1] - width) // 2
        pixels = pixels[top : top + height, left : left + width]
        if self.extents is not None:
            height, width = self.extents[row]
        if pixels.shape[:2] != (height, width):
            got = f"{pixels.shape[0]}×{pixels.shape[1]}"
            raise Unreadable(name, f"expected {height}×{width} pixels, got {got}")
        image = np.zeros(self.image_shape, np.uint8)
        image[:height, :width] = pixels
        return image, on_white


def prepared(
    data: Dataset, preparation: Preparation, cache: Path | None, known: Known, progress: Progress
) -> Dataset:
    """A set of files with its images, in the cache, or decoded when they are needed. Raises
    `FieldError` naming pictures that cannot be read, and `OSError`."""
    files, names, skips = data.images, data.images.names, preparation.skip_unreadable
    preparation = replace(preparation, channels=preparation.channels or files.channels)
    digests, heads, wrong = look(files, known, progress)
    kept = [name for name in names if name in heads]
    if wrong and not skips:
        raise _refused(wrong)
    if not kept:
        raise FieldError("data", f"none of {len(names):,} pictures can be read")
    shape, extents, notes = _fitted({name: heads[name] for name in kept}, preparation)
    pictures = Pictures(files.only(kept), digests, preparation, shape, extents, known.path)
    sha256 = hashlib.sha256(b"".join(digests.get(name, bytes(32)) for name in names)).hexdigest()
    images, failed, on_white, why = None, {}, 0, ""
    try:
        images, failed, on_white = _cached(cache, sha256, pictures, progress)
    except OSError as error:
        if cache != default_cache():
            error.filename = error.filename or str(cache)
            raise  # otherwise nobody asked for it
        why = f" (cannot write {error.filename or cache}: {error.strerror or error})"
    if images is None:
        files.read(kept[0])  # not every archive can give one at a time
        if skips:
            failed, _ = pictures.decode_all(lambda row, image: None, progress)
        size = np.prod(pictures.shape) / 2**30
        notes.append(f"decoded whenever they are needed: {size:.1f} GiB are not kept{why}")
    if on_white:
        notes.append(f"pictures with transparency, which is white now: {on_white:,}")
    if failed:
        undecoded = {kept[row]: failed[row] for row in sorted(failed)}
        if not skips:
            raise _refused(undecoded)
        wrong |= undecoded
        pictures = pictures.some(np.delete(np.arange(len(kept)), sorted(failed)))
    if not len(pictures):
        raise FieldError("data", f"none of {len(names):,} pictures can be decoded")
    if wrong:
        notes.append(f"pictures that cannot be read, left out: {len(wrong):,} ({_listed(wrong)})")
    labels = data.labels
    if labels is not None and wrong:
        labels = labels[[name not in wrong for name in names]]
    if images is None:
        images = pictures
    notes, extents = (*data.notes, *notes), pictures.extents
    return replace(data, images=images, labels=labels, notes=notes, extents=extents, sha256=sha256)


def _fitted(
    heads: Mapping[str, Survey], preparation: Preparation
) -> tuple[tuple[int, int, int], np.ndarray | None, list[str]]:
    """The shape of the images, their extents in it, and what to say of them. Raises `FieldError`
    naming two of other sizes, where there is no image size to bring them to."""
    found, notes, target = list(heads.values()), [], preparation.image_size
    grey = sum(head.grey for head in found)
    channels = preparation.channels or (1 if grey == len(found) else 3)
    if preparation.channels is None and channels == 3 and grey:
        notes.append(f"grey pictures among those in colour, taken as RGB: {grey:,}")
    if several := sum(head.several for head in found):
        notes.append(f"pictures of several frames, of which the first is taken: {several:,}")
    largest = max((head.largest for head in found if head.largest is not None), default=65535)
    if largest < 2**15:
        problem = f"dark (light if 0 is white): no value is above {largest:,} of 65,535 in 16 bits"
        notes.append(f"{problem}; times {65535 // max(largest, 1)}, they would have all tones")
    sizes = [resized_shape(head.height, head.width, preparation) for head in found]
    if target is None and len(set(sizes)) > 1:
        name_of = dict(zip(sizes, heads, strict=True))
        one, two, *_ = [f"{name} is {size[0]}×{size[1]}" for size, name in name_of.items()]
        problem = "expected pictures of one size, or an image size to bring them to"
        raise FieldError("data", f"{problem}: {one}, {two}")
    height, width = np.max(sizes, axis=0).tolist()
    extents = None
    if target is not None and preparation.crop == "random":
        longest = _LONGEST * target
        if cut := sum(max(size) > longest for size in sizes):
            notes.append(f"pictures of which the middle {_LONGEST}:1 is kept: {cut:,}")
        height, width = min(height, longest), min(width, longest)
        extents = np.minimum(sizes, [height, width]).astype(np.int32)
    return (height, width, channels), extents, notes


def default_cache() -> Path | None:
    """For decoded pictures: ~/.cache/jax_ddpm/images, or in XDG_CACHE_HOME; None without a home."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if folder.startswith("~") else Path(folder, "jax_ddpm/images")


def _cached(
    cache: Path | None, sha256: str, pictures: Pictures, progress: Progress
) -> tuple[np.ndarray | None, dict[int, str], int]:
    """The images in the cache, mapped, with what `decode_all` said of them; decoded into it if they
    are not there. None where there is no room for them."""
    how = pictures.preparation.image_size, pictures.preparation.crop, pictures.image_shape
    key, size = _hex(f"{sha256} {how} {_VERSION}"), int(np.prod(pictures.shape))
    if cache is None or (cache == default_cache() and size > _LARGEST):
        return None, {}, 0
    folder = cache / key
    opened = _open(folder, pictures.shape)
    if opened is None:
        make_folder(cache)
        for killed in cache.glob(".*-*"):
            lock = cache / f"{killed.name.partition('-')[0]}.lock"
            with suppress(OSError), _alone(lock) as alone:
                if alone:
                    shutil.rmtree(killed, ignore_errors=True)
        if 2 * size > shutil.disk_usage(cache).free:
            return None, {}, 0
        with _alone(cache / f".{key}.lock", partial(progress, "waiting", 0, len(pictures))):
            if _open(folder, pictures.shape) is None:
                shutil.rmtree(folder, ignore_errors=True)  # it is damaged
                with TemporaryDirectory(prefix=f".{key}-", dir=cache) as temporary:
                    new = Path(temporary, "new")
                    new.mkdir()
                    _write(new, pictures, progress)
                    with suppress(OSError):  # another process was first: the system has no locks
                        new.rename(folder)
        opened = _open(folder, pictures.shape)
    return opened or (None, {}, 0)


def _open(folder: Path, shape: tuple[int, ...]) -> tuple[np.ndarray, dict[int, str], int] | None:
    """What is in a folder of the cache; None if there is none, or not what was written."""
    with suppress(FileNotFoundError, ValueError, EOFError, TokenError):  # the last is of a header
        about = read_json(folder / "about.json")
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        if images.dtype == np.uint8 and images.shape == shape:
            failed = dict(about["failed"])
            return images[: len(images) - len(failed)], failed, about["on_white"]
    return None


def _write(folder: Path, pictures: Pictures, progress: Progress) -> None:
    """Decode every picture into its row. Those that cannot be decoded leave none, and as many rows
    at the end mean nothing."""
    path, size = folder / "images.npy", int(np.prod(pictures.image_shape))
    start = np.lib.format.open_memmap(path, "w+", np.uint8, shape=pictures.shape).offset
    with path.open("r+b") as file:  # written through a map, a full disk would end the process

        def write(row: int, image: Any) -> None:
            file.seek(start + row * size)
            file.write(image)

        failed, on_white = pictures.decode_all(write, progress)
        for new, old in enumerate(np.delete(np.arange(len(pictures)), sorted(failed)).tolist()):
            if new != old:
                file.seek(start + old * size)
                write(new, file.read(size))
        file.flush()
        os.fsync(file.fileno())
    write_json(folder / "about.json", {"failed": [*failed.items()], "on_white": on_white})


@contextmanager
def _alone(path: Path, waits: Callable[[], Any] | None = None) -> Iterator[bool]:
    """Whether no other process of this host is here: with `waits`, which is called if one is, wait
    for it. False where the system has no locks."""
    alone = False
    with path.open("a") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waits is None:
                    raise
                waits()
                fcntl.flock(lock, fcntl.LOCK_EX)
            alone = True
        yield alone


def _hex(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:32]


def _digest(each: Encoded) -> bytes:
    if isinstance(each, bytes):
        return hashlib.sha256(each).digest()
    pixels = np.ascontiguousarray(each)
    return hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).digest()


def _refused(wrong: Mapping[str, str]) -> FieldError:
    """Names pictures, and the setting that leaves them out."""
    larger = (Field("max_pixels"), " reads larger ones, ") if "bomb" in str(wrong.values()) else ()
    end = Field("skip_unreadable", True), " leaves such pictures out"
    return FieldError("data", f"cannot read {_listed(wrong)}; ", *larger, *end)


def _listed(wrong: Mapping[str, str]) -> str:
    few = "; ".join(f"{name}: {why}" for name, why in islice(wrong.items(), 3))
    return f"{few}, … ({len(wrong):,} in all)" if len(wrong) > 3 else few
