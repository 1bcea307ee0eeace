"""Bytes to rows: pictures of many sizes and kinds as one indexed set of uint8 images.

    source ─ look ─▶ sizes, channels, digests ─▶ decoded once into the cache, or when needed

Looking fixes what a resumed run must find unchanged: the shape, and a digest of what was read.
The cache keeps

    SET.json      what was found in each file of a set, by its size and times of change
    KEY.pixels    uint8 [image, height, width, channel], and nothing else

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
from typing import Any
from uuid import uuid4

import numpy as np
import PIL
from PIL import Image, ImageFile

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data.dataset import Dataset, Preparation
from jax_ddpm.data.decoding import Encoded, Survey, decode, resized_shape, survey
from jax_ddpm.data.files import NO_MEMORY, Files, reason
from jax_ddpm.io.files import make_folder, replace_file, replacing

Progress = Callable[[str, int, int], Any]

_VERSION = f"6 {PIL.__version__}"  # of the cache, and of the decoding
_LARGEST = 2**34  # bytes of decoded pictures that are kept in the default cache
_AT_ONCE = 64


class Known(dict[str, list[Any]]):
    """By the name of a file its stamp ("" of what is not known for good), its digest, the header of
    a picture, or what is wrong with it, and once it was decoded, what is wrong with its pixels."""

    path: Path | None = None  # of the file of the cache that keeps it

    def forget(self) -> None:
        """So that the next start reads all files again."""
        self.clear()
        if self.path is not None:
            with suppress(OSError):
                self.path.unlink()


class _Refused(FieldError):
    """Pictures cannot be read: `wrong` says why, by their names."""

    def __init__(self, wrong: Mapping[str, str]) -> None:
        larger = (Field("max_pixels"), " reads larger ones, ") if "bomb" in str(wrong) else ()
        end = Field("skip_unreadable", True), " leaves such pictures out"
        super().__init__("data", f"cannot read {_listed(wrong)}; ", *larger, *end)
        self.wrong = wrong

    def __reduce__(self) -> Any:
        return _Refused, (self.wrong,)


def _listed(wrong: Mapping[str, str]) -> str:
    each = [f"{name}: {why}" for name, why in wrong.items()]
    return "; ".join(each[:3] + [f"… ({len(each):,} in all)"] * (len(each) > 3))


@contextmanager
def remembered(cache: Path | None, data: str) -> Iterator[Known]:
    """What was found in the files of a set: `look` adds to it, and the cache keeps it."""
    Image.init()
    reads = Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, sorted(Image.ID)
    key = _digest(os.fsencode(f"{_VERSION} {reads} {os.path.abspath(data)}"))[:32]
    known = Known()
    path = known.path = cache and cache / f"{key}.json"
    with suppress(OSError, ValueError):
        known.update(json.loads(path.read_bytes()) if path else {})
    before = dict(known)
    try:
        yield known
    finally:
        # With more memory the next start may read what this one could not.
        kept = {name: each for name, each in known.items() if each[0] and NO_MEMORY not in each}
        if path and kept and kept != before:
            with suppress(OSError):
                make_folder(path.parent)
                replace_file(path, json.dumps(kept).encode())
        known.clear()  # `Pictures` hold it as long as they are in use


def look(files: Files, known: dict[str, list[Any]], progress: Progress, most: int = -1) -> None:
    """Bring `known` up to date for these files. Of each that has changed all is read, or `most`
    bytes of what may be something else."""
    stamps = {name: files.stamp(name) for name in files.names}
    new = [name for name, stamp in stamps.items() if known.get(name, [None])[0] != stamp]
    first = len(stamps) - len(new)
    progress("reading", first, len(stamps))
    for done, (name, read) in enumerate(files.stream(new, most), first + 1):
        data, digest = None, bytes(32).hex()
        try:
            data = read()
            digest = _digest(data)
            found = survey(data)
        except Exception as error:  # Pillow's plugins raise whatever they meet
            found = reason(error)
        whole = data is not None and len(data) != most
        known[name] = [stamps[name] if whole else "", digest, found]
        progress("reading", done, len(stamps))


@dataclass(frozen=True)
class Pictures:
    """An array of images, uint8 [image, height, width, channel], that are decoded when rows of it
    are asked for. Safe in several threads."""

    files: Files
    known: Known
    digests: Mapping[str, str]  # of what each file held when it was looked at
    preparation: Preparation
    image_shape: tuple[int, int, int]
    extents: np.ndarray | None  # of each picture within that shape, int32 [image, 2]

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array's."""
        return len(self), *self.image_shape

    def __len__(self) -> int:
        return len(self.files.names)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `ValueError` naming a picture that cannot be read or decoded."""
        chosen = np.arange(len(self))[rows]
        images = np.empty((chosen.size, *self.image_shape), np.uint8)
        for place, row in enumerate(chosen.ravel().tolist()):
            images[place] = self._decode(row, partial(self.files.read, self.files.names[row]))
        return images.reshape(*chosen.shape, *self.image_shape)

    def some(self, rows: np.ndarray) -> "Pictures":
        """The array of these rows, none of which is decoded yet."""
        extents = None if self.extents is None else self.extents[rows]
        files = self.files.only([self.files.names[row] for row in rows])
        return replace(self, files=files, extents=extents)

    def decoded(self, progress: Progress) -> Iterator[tuple[int, np.ndarray]]:
        """The row and the pixels of each picture, decoded by all cores. Raises `_Refused` at the
        end, naming all that cannot be decoded, which is known then."""
        row_of = {name: row for row, name in enumerate(self.files.names)}
        wrong, done, pictures = {}, 0, self.files.stream(row_of)
        with ThreadPoolExecutor() as threads:
            while block := list(islice(pictures, _AT_ONCE)):
                tasks = [threads.submit(self._decode, row_of[name], read) for name, read in block]
                for (name, _), task in zip(block, tasks, strict=True):
                    try:
                        yield row_of[name], task.result()
                    except _Refused as error:
                        wrong |= error.wrong
                done += len(block)
                progress("decoding", done, len(self))
        for name in row_of:
            self.known[name] = [*self.known[name][:3], wrong.get(name)]
        if wrong:
            raise _Refused(wrong)

    def _decode(self, row: int, read: Callable[[], Encoded]) -> np.ndarray:
        """One picture, in the upper left of its image. Raises `_Refused` if it cannot be decoded,
        and `ValueError` if it cannot be read or is not what was looked at."""
        name, data, image = self.files.names[row], read(), np.zeros(self.image_shape, np.uint8)
        *sides, channels = self.image_shape
        height, width = sides if self.extents is None else self.extents[row]
        if _digest(data) != self.digests[name]:
            self.known.forget()  # or it would end every start
            raise FieldError("data", f"{name} has changed since it was first read")
        try:
            pixels = decode(data, channels, self.preparation)  # pyright: ignore[reportArgumentType]
            image[:height, :width] = pixels
        except Exception as error:  # Pillow's plugins raise whatever they meet
            raise _Refused({name: reason(error)}) from None
        return image


def prepared(
    data: Dataset, preparation: Preparation, cache: Path | None, known: Known, progress: Progress
) -> Dataset:
    """A set of files with its images, in the cache, or decoded when they are needed. Raises
    `FieldError` naming pictures that cannot be read, and `OSError`."""
    files, names, skips = data.images, data.images.names, preparation.skip_unreadable
    preparation = replace(preparation, channels=preparation.channels or files.channels)
    look(files, known, progress)
    digests = {name: known[name][1] for name in names}
    wrong = {name: why for name in names for why in known[name][2:] if isinstance(why, str)}
    heads = {name: Survey(*known[name][2]) for name in names if name not in wrong}
    if wrong and not skips:
        raise _Refused(wrong)
    if not heads:
        raise FieldError("data", f"none of {len(names):,} pictures can be read")
    shape, extents, notes = _fitted(heads, preparation)
    pictures = Pictures(files.only([*heads]), known, digests, preparation, shape, extents)
    try:
        images = _cached(cache, pictures, progress)
        if images is None:
            files.read(pictures.files.names[0])  # not every archive can give one at a time
            new = [row for row, name in enumerate(heads) if len(known[name]) == 3]
            for _ in pictures.some(np.array(new, int)).decoded(progress) if skips else ():
                pass  # it is decoded again when it is needed
    except _Refused:  # by now these are known: they are named, or left out
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
        notes.append(f"pictures that cannot be read, left out: {len(wrong):,} ({_listed(wrong)})")
    labels = data.labels
    if labels is not None:
        labels = labels[[name in heads for name in names]]
    notes, sha256 = (*data.notes, *notes), _digest(bytes.fromhex("".join(digests.values())))
    return replace(data, images=images, labels=labels, notes=notes, extents=extents, sha256=sha256)


def _fitted(
    heads: Mapping[str, Survey], preparation: Preparation
) -> tuple[tuple[int, int, int], np.ndarray | None, list[str]]:
    """The shape of the images, their extents in it, and what to say of them. Raises `FieldError`
    naming two of other sizes, where there is no image size to bring them to."""
    found = heads.values()
    sizes = [resized_shape(head.height, head.width, preparation) for head in found]
    if preparation.image_size is None and len({*sizes}) > 1:
        name_of = dict(zip(sizes, heads, strict=True))
        one, two, *_ = [f"{name} is {size[0]}×{size[1]}" for size, name in name_of.items()]
        problem = "expected pictures of one size, or an image size to bring them to"
        raise FieldError("data", f"{problem}: {one}, {two}")
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
    """The images in the cache, mapped; decoded into it if they are not there. None where there is
    no room for them."""
    shape, each = pictures.shape, int(np.prod(pictures.image_shape))
    size = each * len(pictures)
    if cache is None or (cache == default_cache() and size > _LARGEST):
        return None
    read = "".join(pictures.digests[name] for name in pictures.files.names)
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
