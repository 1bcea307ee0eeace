"""Bytes to rows: pictures of many sizes and kinds as one indexed set of uint8 images.

    files ─ look ─▶ sizes, channels, digests ─▶ decoded once into the cache, or when needed

The cache keeps SET.json, what was found in each file of a set, by its size and times of change; and
KEY.pixels, uint8 [image, height, width, channel], of which KEY is a digest of what was read, of how
it is prepared, and of Pillow's version.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import PIL
from PIL import Image, ImageFile

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data.dataset import Dataset, Preparation
from jax_ddpm.data.decoding import Encoded, Survey, decode, resized_shape, survey
from jax_ddpm.data.files import Files, reason
from jax_ddpm.io.files import make_folder, replace_file, replacing

Progress = Callable[[str, int, int], Any]

_VERSION = f"7 {PIL.__version__}"  # of the cache, and of the decoding
_LARGEST = 2**34  # bytes of decoded pictures that are kept in the default cache
_AT_ONCE = 64


class Known(dict[str, list[Any]]):
    """By the name of a file: its stamp, its digest, its `Survey` or why it has none, and why its
    pixels cannot be decoded ("" if they can, None if nobody tried). The cache keeps it."""

    def __init__(self, cache: Path | None, data: str) -> None:
        super().__init__()
        Image.init()
        reads = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, sorted(Image.ID)
        key = _digest(os.fsencode(f"{_VERSION} {reads} {os.path.abspath(data)}"))[:32]
        self.path = cache and cache / f"{key}.json"
        with suppress(OSError, ValueError):
            self.update(json.loads(self.path.read_bytes()) if self.path else {})

    def save(self) -> None:
        kept = {name: each for name, each in self.items() if each[0]}  # known for good
        if self.path and kept:
            with suppress(OSError):
                make_folder(self.path.parent)
                replace_file(self.path, json.dumps(kept).encode())


class _Undecoded(Exception):
    """Pictures cannot be decoded: `Known` says which."""


def look(files: Files, known: Known, progress: Progress) -> None:
    """Bring `known` up to date: what has changed is read."""

    def look_at(name: str, read: Callable[[], Encoded]) -> list[Any]:
        stamp, digest = "", bytes(32).hex()
        try:
            data = read()
            stamp, digest = stamps[name], _digest(data)
            found = survey(data)
        except Exception as error:  # Pillow's plugins raise whatever they meet
            found = reason(error)
        return [stamp, digest, found, None]

    stamps = {name: files.stamp(name) for name in files.names}
    new = [name for name, stamp in stamps.items() if known.get(name, [None])[0] != stamp]
    tell = partial(progress, "reading")
    try:
        known.update(
            _of_each(look_at, files.stream(new), tell, len(stamps) - len(new), len(stamps))
        )
    finally:  # what was read is kept
        if new:
            known.save()


def _of_each(
    work: Callable[..., Any], files: Iterator[Any], tell: Callable[..., Any], done: int, total: int
) -> Iterator[tuple[str, Any]]:
    """The name of each file and what `work(name, read)` makes of it, by all cores."""
    with ThreadPoolExecutor() as threads:
        while block := list(islice(files, _AT_ONCE)):
            names, readers = zip(*block, strict=True)
            yield from zip(names, threads.map(work, names, readers), strict=True)
            done += len(block)
            tell(done, total)


@dataclass(frozen=True, eq=False)
class Pictures:
    """An array of images, uint8 [image, height, width, channel], that are decoded when rows of it
    are asked for. Safe in several threads."""

    files: Files
    names: Sequence[str]  # of the files, in the order of the rows
    known: Known
    preparation: Preparation
    image_shape: tuple[int, int, int]

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array's."""
        return len(self), *self.image_shape

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `FieldError` naming a picture that cannot be read or decoded."""
        chosen = np.arange(len(self))[rows]
        images = np.empty((chosen.size, *self.image_shape), np.uint8)
        for place, row in enumerate(chosen.ravel().tolist()):
            name = self.names[row]
            image = self._decode(name, partial(self.files.read, name))
            if isinstance(image, str):
                raise FieldError("data", f"cannot read {name}: {image}")
            images[place] = image
        return images.reshape(*chosen.shape, *self.image_shape)

    def some(self, rows: Any) -> "Pictures":
        """The array of these rows, none of which is decoded yet."""
        return replace(self, names=[self.names[row] for row in np.arange(len(self))[rows]])

    def decoded(self, progress: Progress) -> Iterator[tuple[int, np.ndarray]]:
        """The row and the pixels of each picture. In the end may raise `_Undecoded`."""
        row_of, known = {name: row for row, name in enumerate(self.names)}, self.known
        files, tell = self.files.stream(row_of), partial(progress, "decoding")
        for name, image in _of_each(self._decode, files, tell, 0, len(self)):
            known[name][3] = image if isinstance(image, str) else ""
            if not isinstance(image, str):
                yield row_of[name], image
        known.save()
        if any(known[name][3] for name in row_of):
            raise _Undecoded

    def _decode(self, name: str, read: Callable[[], Encoded]) -> np.ndarray | str:
        """One picture, in the upper left of its image, or why it cannot be decoded."""
        data, image = read(), np.zeros(self.image_shape, np.uint8)
        if _digest(data) != self.known[name][1]:
            with suppress(OSError, AttributeError):  # or it would end every start
                self.known.path.unlink()  # pyright: ignore[reportOptionalMemberAccess]
            raise FieldError("data", f"{name} has changed since it was first read")
        try:
            pixels = decode(data, self.image_shape[2], self.preparation)
            image[: len(pixels), : len(pixels[0])] = pixels
        except Exception as error:  # Pillow's plugins raise whatever they meet
            return reason(error)
        return image


def prepared(
    data: Dataset, preparation: Preparation, cache: Path | None, known: Known, progress: Progress
) -> Dataset:
    """A set of files with its images. Raises `FieldError` naming what cannot be read, `OSError`."""
    files, names, labels = data.images, data.images.names, data.labels
    look(files, known, progress)
    wrong = {name: why for name in names for why in known[name][2:] if isinstance(why, str) and why}
    heads = {name: Survey(*known[name][2]) for name in names if name not in wrong}
    listed = [f"{name}: {why}" for name, why in islice(wrong.items(), 3)]
    listed = "; ".join(listed + [f"… ({len(wrong):,} in all)"] * (len(wrong) > 3))
    if not heads or (wrong and not preparation.skip_unreadable):
        ways = Field("skip_unreadable", True), " leaves such pictures out, ", Field("max_pixels")
        raise FieldError("data", f"cannot read {listed}; ", *ways, " reads larger ones")
    shape, extents, notes = _fitted(heads, preparation)
    pictures = Pictures(files, [*heads], known, preparation, shape)
    try:
        images = _cached(cache, pictures, progress)
        if images is None:
            files.read(pictures.names[0])  # not every archive can give one at a time
        if images is None and preparation.skip_unreadable:
            new = [row for row, name in enumerate(heads) if known[name][3] is None]
            for _ in pictures.some(np.array(new, int)).decoded(progress):
                pass  # it is decoded again when it is needed
    except _Undecoded:  # by now these are known: they are named, or left out
        return prepared(data, preparation, cache, known, progress)
    except OSError as error:
        if cache != default_cache():
            raise  # otherwise nobody asked for it
        data = replace(data, notes=(*data.notes, f"cannot write into the cache: {error}"))
        return prepared(data, preparation, None, known, progress)
    if images is None:
        images, size = pictures, np.prod(pictures.shape) / 2**30
        notes.append(f"decoded whenever they are needed: {size:.1f} GiB are not kept")
    if wrong:
        notes.append(f"pictures that cannot be read, left out: {len(wrong):,} ({listed})")
    if labels is not None:
        labels = labels[[name in heads for name in names]]
    sha256 = _digest(bytes.fromhex("".join(known[name][1] for name in names)))
    notes = *data.notes, *notes
    return replace(data, images=images, labels=labels, notes=notes, extents=extents, sha256=sha256)


def _fitted(
    heads: Mapping[str, Survey], preparation: Preparation
) -> tuple[tuple[int, int, int], np.ndarray | None, list[str]]:
    """The shape of the images, their extents in it, and what to say of them."""
    found = heads.values()
    sizes = [resized_shape(head.height, head.width, preparation) for head in found]
    if preparation.image_size is None and len({*sizes}) > 1:
        name_of = dict(zip(sizes, heads, strict=True))
        one, two, *_ = [f"{name} is {size[0]}×{size[1]}" for size, name in name_of.items()]
        expected = "expected pictures of one size, or ", Field("image_size")
        raise FieldError("data", *expected, f" to bring them to: {one}, {two}")
    height, width = np.max(sizes, axis=0).tolist()
    extents = np.asarray(sizes, np.int32) if preparation.crop == "random" else None
    channels = preparation.channels or (1 if all(head.grey for head in found) else 3)
    notes = []
    if several := sum(head.several for head in found):
        notes.append(f"pictures of several frames, of which the first is taken: {several:,}")
    if channels != 4 and (opacity := sum(head.opacity for head in found)):
        notes.append(f"pictures with opacity, put on white: {opacity:,}")
    largest = max((head.largest for head in found if head.largest is not None), default=65535)
    if largest < 2**15:
        problem = f"dark (light if 0 is white): no value is above {largest:,} of 65,535 in 16 bits"
        notes.append(f"{problem}; times {65535 // max(largest, 1)}, they would have all tones")
    return (height, width, channels), extents, notes


def default_cache() -> Path | None:
    """For decoded pictures: ~/.cache/jax_ddpm/images, or in XDG_CACHE_HOME; None without a home."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if folder.startswith("~") else Path(folder, "jax_ddpm/images")


def _cached(cache: Path | None, pictures: Pictures, progress: Progress) -> np.ndarray | None:
    """The images in the cache, mapped; decoded into it first if need be. None without room."""
    shape, each = pictures.shape, int(np.prod(pictures.image_shape))
    size = each * len(pictures)
    if cache is None or (cache == default_cache() and size > _LARGEST):
        return None
    read = "".join(pictures.known[name][1] for name in pictures.names)
    how = _VERSION, pictures.preparation.image_size, pictures.preparation.crop, shape
    key = _digest(f"{how} {read}".encode())[:32]
    path = cache / f"{key}.pixels"
    if not _is_whole(path, size):
        make_folder(cache)
        with (cache / f".{key}.lock").open("a") as lock:
            if _locked(lock, partial(progress, "waiting", 0, len(pictures))):
                for left in cache.glob(f"*{key}-*"):
                    left.unlink()  # by a writer that was killed
            if not _is_whole(path, size):  # nor has another process written it since
                if 2 * size > shutil.disk_usage(cache).free:
                    return None
                own = cache / f"{key}-{uuid4().hex}"  # without locks others may write theirs
                with replacing(own) as file:  # through a map, a full disk would end the process
                    for row, image in pictures.decoded(progress):
                        file.seek(row * each)
                        file.write(image.data)
                own.replace(path)
    return np.memmap(path, np.uint8, "r", shape=shape)


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _locked(file: Any, waits: Callable[[], Any]) -> bool:
    """Wait until no other process of this host has it. False where the system has no locks."""
    with suppress(ImportError, OSError):
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waits()
            fcntl.flock(file, fcntl.LOCK_EX)
        return True
    return False


def _digest(data: Encoded) -> str:
    if isinstance(data, np.ndarray):  # whose shape counts too
        data = f"{data.shape} ".encode() + data.tobytes()
    return hashlib.sha256(data).hexdigest()
