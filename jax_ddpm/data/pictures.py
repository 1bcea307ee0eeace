"""Bytes to rows: pictures of many sizes and kinds as one indexed set of uint8 images.

    source ─ look ─▶ sizes, channels, digests ─▶ decoded once into the cache, or when needed

Looking fixes what a resumed run must find unchanged: the shape, and a digest of what was read. A
picture that is another when it is decoded ends the command. The cache keeps

    SET.json           what was found in each file of a set, by its size and time of change
    KEY/images.npy     uint8 [image, height, width, channel]
    KEY/about.json     their shape, and what could not be decoded

KEY is a digest of what was read, of how it is prepared, and of Pillow's version. A folder gets its
name only once it is whole.
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

import numpy as np

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data.dataset import Dataset, Preparation
from jax_ddpm.data.decoding import Encoded, Survey, decode, resized_shape, survey
from jax_ddpm.data.files import Unreadable
from jax_ddpm.io.files import make_folder, new_folder, read_json, replace_file, write_json

Known = dict[str, list[Any]]
"""By the name of a file its stamp, its digest ("" if it is no picture) and its header."""
Read = Callable[[], Encoded]
"""Reads one picture. Raises `ValueError`."""

_VERSION = 4  # of the decoding and of the cache
_LARGEST = 2**34
"""Bytes of decoded pictures that are kept in the default cache."""
_AT_ONCE = 64
_LONGEST = 2
"""What is kept of a picture that is longer than it is wide, in image sizes, for random windows."""


class _Changed(FieldError):
    """A picture is not the one that was looked at."""


@dataclass(frozen=True)
class Source:
    """Pictures before they are decoded, and the class of each, if they have one."""

    names: list[str]
    """What each is called in messages, in the order that a training knows them in."""
    read: Callable[[int], Encoded]
    """One of them. Several threads may call it at once. Raises `ValueError`."""
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()
    stamp: Callable[[int], str] = lambda index: ""
    """What is another once a picture is another; "" where nothing says so."""
    stream: Callable[[list[int]], Iterator[tuple[int, Read]]] | None = None
    """Some of them, and what reads each, in the order that is fastest. Default: one by one."""

    def each(self, indices: list[int]) -> Iterator[tuple[int, Read]]:
        """Some of the pictures, and what reads each."""
        one_by_one = ((index, partial(self.read, index)) for index in indices)
        return self.stream(indices) if self.stream else one_by_one


@contextmanager
def remembered(cache: Path | None, data: str) -> Iterator[Known]:
    """What was found in the files of a set, by their names: `look` adds to it, and it is kept for
    the next start where the cache can be written."""
    known, path = {}, cache and cache / f"{_hex(f'{_version()} {os.path.abspath(data)}')}.json"
    with suppress(OSError, ValueError):
        known = json.loads(path.read_bytes()) if path else {}
    before = dict(known)
    try:
        yield known
    except _Changed:  # in spite of its size and time
        known.clear()
        raise
    finally:
        if path and known != before:
            with suppress(OSError):
                make_folder(path.parent)
                replace_file(path, json.dumps(known).encode())


def look(
    source: Source, known: Known, progress: Callable[[int], None], most: int = 2**63
) -> tuple[list[bytes], list[Survey | None], dict[int, str]]:
    """Of each picture its digest, zeros if it cannot be read, and its header or what is wrong. What
    is not known is read, and at most so many bytes of what may be something else."""
    count = len(source.names)
    digests, wrong, unknown = [bytes(32)] * count, {}, {}
    heads: list[Survey | None] = [None] * count
    for index, name in enumerate(source.names):
        stamp, (was, digest, *head) = source.stamp(index), known.get(name, ("", ""))
        if not stamp or stamp != was:
            unknown[index] = stamp
        elif digest:
            digests[index], heads[index] = bytes.fromhex(digest), Survey(*head)
        else:
            wrong[index] = "no picture"
    progress(count - len(unknown))
    for done, (index, read) in enumerate(source.each([*unknown]), count - len(unknown) + 1):
        entry = None
        try:
            data = read()
            digests[index], entry = _digest(data), [unknown[index], ""]
            heads[index] = head = survey(data)
            entry = [unknown[index], digests[index].hex(), *head] if len(data) < most else None
        except Exception as error:  # Pillow's plugins raise whatever they meet
            wrong[index] = reason(error)
            entry = entry if most < 2**63 else None  # one that should be a picture is read again
        if entry is not None:
            known[source.names[index]] = entry
        progress(done)
    return digests, heads, wrong


@dataclass(frozen=True)
class Pictures:
    """An array of images, uint8 [image, height, width, channel], that are decoded when rows of it
    are asked for. Safe in several threads."""

    source: Source
    preparation: Preparation
    digests: list[bytes]
    """SHA-256 of every picture of the source."""
    kept: np.ndarray
    """Indices of those that can be read, int64."""
    image_shape: tuple[int, int, int]
    extents: np.ndarray | None
    """Height and width of each picture within that shape, int32 [image, 2], if they differ."""

    dtype = np.dtype(np.uint8)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As an array's."""
        return len(self.kept), *self.image_shape

    @property
    def sha256(self) -> str:
        """Of everything that was read, in hexadecimal."""
        return hashlib.sha256(b"".join(self.digests)).hexdigest()

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `FieldError` naming a picture that cannot be decoded."""
        chosen = np.arange(len(self))[rows]
        images = np.zeros((chosen.size, *self.image_shape), np.uint8)
        for image, row in zip(images, chosen.ravel().tolist(), strict=True):
            try:
                self._decode(row, partial(self.source.read, int(self.kept[row])), image)
            except Unreadable as error:
                raise _refused({self._name(row): error.reason}) from None
        return images.reshape(*np.shape(chosen), *self.image_shape)

    def some(self, rows: np.ndarray) -> "Pictures":
        """The array of these rows, none of which is decoded yet."""
        extents = None if self.extents is None else self.extents[rows]
        return replace(self, kept=self.kept[rows], extents=extents)

    def decode_all(
        self, write: Callable[[int, np.ndarray], Any], progress: Callable[[int], None]
    ) -> tuple[dict[int, str], int]:
        """Decode each picture by all cores, and give its row and its pixels to `write`.

        Why others cannot be decoded, by their rows, and how many had transparent pixels. Raises
        `FieldError` naming one that has changed since it was looked at.
        """
        row_of = {int(index): row for row, index in enumerate(self.kept)}
        failed, on_white, done = {}, 0, 0
        pictures = self.source.each(list(row_of))
        with ThreadPoolExecutor() as threads:
            while block := list(islice(pictures, _AT_ONCE)):
                images = np.zeros((len(block), *self.image_shape), np.uint8)
                tasks = {
                    row_of[index]: threads.submit(self._decode, row_of[index], read, image)
                    for image, (index, read) in zip(images, block, strict=True)
                }
                for image, (row, task) in zip(images, tasks.items(), strict=True):
                    try:
                        on_white += task.result()
                        write(row, image)
                    except Unreadable as error:
                        failed[row] = error.reason
                done += len(block)
                progress(done)
        return failed, on_white

    def _decode(self, row: int, read: Read, image: np.ndarray) -> bool:
        """Decode a picture into `image`, the middle of it if it is larger; whether transparency was
        composed on white. Raises `Unreadable`, and `FieldError` if it is not what was looked at."""
        name, (height, width, channels) = self._name(row), self.image_shape
        try:
            data = read()
        except ValueError as error:
            raise FieldError("data", f"cannot read {name}: {reason(error)}") from None
        if _digest(data) != self.digests[self.kept[row]]:
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
        image[:height, :width] = pixels
        return on_white

    def _name(self, row: int) -> str:
        return self.source.names[self.kept[row]]


def prepared(
    source: Source,
    preparation: Preparation,
    cache: Path | None,
    known: Known,
    progress: Callable[[str, int, int], None] | None,
) -> Dataset:
    """The images of a source, in the cache, or decoded when they are needed where `cache` is None
    or has no room. Raises `FieldError` naming pictures that cannot be read, and `OSError`."""
    names, skips = source.names, preparation.skip_unreadable

    def tell(what: str) -> Callable[[int], None]:
        return lambda done: progress(what, done, len(names)) if progress else None

    digests, heads, failed = look(source, known, tell("reading"))
    wrong = {names[index]: why for index, why in failed.items()}
    if wrong and not skips:
        raise _refused(wrong)
    pictures, notes = _fitted(source, preparation, digests, heads)
    size = int(np.prod(pictures.shape))
    images, failed, why, is_default = None, {}, "", cache == default_cache()
    if cache is not None and (not is_default or size <= _LARGEST):
        try:
            images, failed, on_white = _cached(cache, pictures, tell("decoding"))
            if on_white:
                notes.append(f"pictures with transparency, which is white now: {on_white:,}")
        except OSError as error:
            if not is_default:
                raise  # otherwise nobody asked for it
            why = f" (cannot write {error.filename or cache}: {error.strerror or error})"
    if images is None:
        source.read(int(pictures.kept[0]))  # not every archive can give one at a time
        if skips:
            failed, _ = pictures.decode_all(lambda row, image: None, tell("decoding"))
        notes.append(f"decoded whenever they are needed: {size / 2**30:.1f} GiB are not kept{why}")
    if failed:
        undecoded = {names[pictures.kept[row]]: failed[row] for row in sorted(failed)}
        if not skips:
            raise _refused(undecoded)
        wrong |= undecoded
        pictures = pictures.some(np.delete(np.arange(len(pictures)), sorted(failed)))
    if wrong:
        notes.append(f"pictures that cannot be read, left out: {len(wrong):,} ({_listed(wrong)})")
    return Dataset(
        pictures if images is None else images,
        None if source.labels is None else source.labels[pictures.kept],
        notes=(*source.notes, *notes),
        class_names=source.class_names,
        extents=pictures.extents,
        sha256=pictures.sha256,
    )


def _fitted(
    source: Source, preparation: Preparation, digests: list[bytes], heads: list[Survey | None]
) -> tuple[Pictures, list[str]]:
    """Those that can be read as an array, and what to say of them. Raises `FieldError` naming two
    of other sizes, where there is no image size to bring them to."""
    kept = np.flatnonzero([head is not None for head in heads])
    found = [head for head in heads if head is not None]
    if not found:
        raise FieldError("data", f"none of {len(heads):,} pictures can be read")
    grey, notes = sum(head.grey for head in found), []
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
    other = next((row for row, size in enumerate(sizes) if size != sizes[0]), None)
    if preparation.image_size is None and other is not None:
        problem = "expected pictures of one size, or an image size to bring them to: "
        (first, one), (second, two) = [(source.names[kept[k]], sizes[k]) for k in (0, other)]
        got = f"{first} is {one[0]}×{one[1]}, {second} {two[0]}×{two[1]}"
        raise FieldError("data", problem + got)
    height, width = np.max(sizes, axis=0).tolist()
    extents = None
    if preparation.image_size is not None and preparation.crop == "random":
        longest = _LONGEST * preparation.image_size
        if cut := sum(max(size) > longest for size in sizes):
            notes.append(f"pictures of which the middle {_LONGEST}:1 is kept: {cut:,}")
        height, width = min(height, longest), min(width, longest)
        extents = np.minimum(sizes, [height, width]).astype(np.int32)
    shape = height, width, channels
    return Pictures(source, preparation, digests, kept, shape, extents), notes


def default_cache() -> Path | None:
    """For decoded pictures: ~/.cache/jax_ddpm/images, or in XDG_CACHE_HOME; None without a home."""
    folder = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return None if folder.startswith("~") else Path(folder, "jax_ddpm/images")


def _cached(
    cache: Path, pictures: Pictures, progress: Callable[[int], None]
) -> tuple[np.ndarray | None, dict[int, str], int]:
    """The images in the cache, mapped, with what `decode_all` said of them; decoded into it if they
    are not there. None where the disk has no room for them. Raises `OSError`."""
    how = pictures.preparation.image_size, pictures.preparation.crop, pictures.image_shape
    key = _hex(f"{pictures.sha256} {how} {_version()}")
    folder = cache / key
    if (opened := _open(folder)) is not None:
        return opened
    make_folder(cache)
    if 2 * int(np.prod(pictures.shape)) > shutil.disk_usage(cache).free:
        return None, {}, 0
    with _alone(cache / f".{key}.lock"):  # the other processes of this host wait
        if _open(folder) is None:
            with new_folder(folder) as new:
                _write(new, pictures, progress)
    return _open(folder) or (None, {}, 0)


def _open(folder: Path) -> tuple[np.ndarray, dict[int, str], int] | None:
    """What is in a folder of the cache; None if there is none, or not what was written."""
    with suppress(FileNotFoundError, ValueError, EOFError):
        about = read_json(folder / "about.json")
        images = np.load(folder / "images.npy", mmap_mode="r", allow_pickle=False)
        if images.dtype == np.uint8 and [*images.shape] == about["shape"]:
            return images, dict(about["failed"]), about["on_white"]
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _write(folder: Path, pictures: Pictures, progress: Callable[[int], None]) -> None:
    """Decode every picture into its row. What cannot be decoded leaves none."""
    count, *shape = pictures.shape
    size = int(np.prod(shape))
    header: dict[str, Any] = {"descr": "|u1", "fortran_order": False}
    with (folder / "images.npy").open("w+b") as file:
        np.lib.format.write_array_header_1_0(file, header | {"shape": pictures.shape})
        start = file.tell()

        def write(row: int, image: bytes | memoryview) -> None:
            file.seek(start + row * size)
            file.write(image)

        failed, on_white = pictures.decode_all(lambda row, image: write(row, image.data), progress)
        good = np.delete(np.arange(count), sorted(failed)).tolist()
        if not good:
            raise FieldError("data", f"none of {count:,} pictures can be decoded")
        for new, old in enumerate(good):
            if new != old:
                file.seek(start + old * size)
                write(new, file.read(size))
        file.truncate(start + len(good) * size)
        file.seek(0)  # NumPy leaves room in its header for another number of rows
        np.lib.format.write_array_header_1_0(file, header | {"shape": (len(good), *shape)})
        file.flush()
        os.fsync(file.fileno())
    about = {"shape": [len(good), *shape], "on_white": on_white, "failed": [*failed.items()]}
    write_json(folder / "about.json", about)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Wait until no other process of this host is here, where the system has locks."""
    with path.open("a") as lock:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _version() -> str:
    from PIL import __version__ as pillow

    return f"{_VERSION} {pillow}"


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


def reason(error: Exception) -> str:
    """The first line of what an error says, without an address in memory."""
    if isinstance(error, Unreadable):
        return error.reason
    said = str(error).partition("\n")[0].partition(" <_io.")[0] or type(error).__name__
    return said.replace("cannot identify image file", "no picture that Pillow can decode")
