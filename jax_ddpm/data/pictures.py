"""Pictures of many sizes and kinds as one indexed set of uint8 images, decoded when asked for.

    encoded ─ survey ─▶ sizes, channels, digest ─▶ decoded once into the cache, or when asked for

The survey reads every byte once. It fixes what a resumed run must find unchanged: the shape, and a
digest of what was read. A picture that is another when it is decoded ends the command.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data.decoding import Encoded, Survey, decode, resized_shape, survey
from jax_ddpm.data.files import Unreadable
from jax_ddpm.data.preparation import Preparation

_Outcome = bool | str
"""Whether transparency was composed on white; or why a picture cannot be decoded."""

_AT_ONCE = 64
_LONGEST = 2
"""What is kept of a picture that is longer than it is wide, in image sizes, for random windows."""


class EncodedSet:
    """Pictures before they are decoded."""

    names: Sequence[str]
    """What each is called in messages, in the order that a training knows them in."""

    def read(self, index: int) -> Encoded:
        """One of them. May be called from several threads at once. Raises `ValueError`."""
        raise NotImplementedError

    def attempt(self, index: int) -> Encoded | ValueError:
        """One of them; in place of one that cannot be read, what `read` raises."""
        try:
            return self.read(index)
        except ValueError as error:
            return error

    def stream(self) -> Iterator[tuple[int, Encoded | ValueError]]:
        """Each of them with its index, as `attempt` gives it, in the order that is fastest."""
        return ((index, self.attempt(index)) for index in range(len(self.names)))


class Found(NamedTuple):
    """What the survey found: what can be read, and all that is needed to decode it."""

    kept: np.ndarray
    """Indices of the pictures whose headers can be read, int64."""
    shape: tuple[int, int, int]
    """Of each image: height, width, channels."""
    extents: np.ndarray | None
    """Height and width of each picture within that shape, int32 [image, 2], if they differ."""
    digests: bytes
    """SHA-256 of each picture, one after the other, whether it is kept or not."""
    unreadable: dict[str, str]
    """Names of the others, and what is wrong with each."""
    notes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Of everything that was read, in hexadecimal."""
        return hashlib.sha256(self.digests).hexdigest()

    def without(self, failed: Mapping[int, str], names: Sequence[str]) -> "Found":
        """The same without these rows, and why. Raises `FieldError` if none is left."""
        if len(failed) == len(self.kept):
            raise FieldError("data", f"none of {len(failed):,} pictures can be decoded")
        rows = sorted(failed)
        wrong = {names[self.kept[row]]: failed[row] for row in rows}
        return self._replace(
            kept=np.delete(self.kept, rows),
            extents=None if self.extents is None else np.delete(self.extents, rows, axis=0),
            unreadable=self.unreadable | wrong,
        )


def look_at(
    encoded: EncodedSet, preparation: Preparation, progress: Callable[[int], None] | None = None
) -> Found:
    """Read every picture, and the header of each.

    Raises `FieldError` naming the first that is unreadable, unless those are skipped, and the
    first of another size, where there is no image size to bring them to.
    """
    count = len(encoded.names)
    heads: list[Survey | None] = [None] * count
    digests, wrong = [bytes(32)] * count, {}
    for done, (index, each) in enumerate(encoded.stream()):
        try:
            if isinstance(each, ValueError):
                raise each
            digests[index] = _digest(each)
            heads[index] = survey(each)
        except Exception as error:  # Pillow's plugins raise whatever they meet
            if not preparation.skip_unreadable:
                raise unreadable(encoded.names[index], reason(error)) from None
            wrong[encoded.names[index]] = reason(error)
        if progress:
            progress(done + 1)
    kept = np.flatnonzero([head is not None for head in heads])
    readable = [head for head in heads if head is not None]
    if not readable:
        raise FieldError("data", f"none of {count:,} pictures can be read")
    channels = preparation.channels or (1 if all(head.grey for head in readable) else 3)
    notes = []
    if preparation.channels is None and channels == 3 and any(head.grey for head in readable):
        grey = sum(head.grey for head in readable)
        notes.append(f"grey pictures among those in colour, taken as RGB: {grey:,}")
    if several := sum(head.several for head in readable):
        notes.append(f"pictures of several frames, of which the first is taken: {several:,}")
    largest = max((head.largest for head in readable if head.largest is not None), default=65535)
    if largest < 2**15:
        problem = f"dark (light if 0 is white): no value is above {largest:,} of 65,535 in 16 bits"
        notes.append(f"{problem}; times {65535 // max(largest, 1)}, they would have all tones")
    sizes = [resized_shape(head.height, head.width, preparation) for head in readable]
    height, width = map(max, zip(*sizes, strict=True))
    other = next((row for row, size in enumerate(sizes) if size != sizes[0]), None)
    if preparation.image_size is None and other is not None:
        problem = "expected pictures of one size, or an image size to bring them to: "
        (first, one), (second, two) = [(encoded.names[kept[k]], sizes[k]) for k in (0, other)]
        got = f"{first} is {one[0]}×{one[1]}, {second} {two[0]}×{two[1]}"
        raise FieldError("data", problem + got)
    extents = None
    if preparation.image_size is not None and preparation.crop == "random":
        longest = _LONGEST * preparation.image_size
        if max(height, width) > longest:
            cut = sum(max(size) > longest for size in sizes)
            notes.append(f"pictures of which the middle {_LONGEST}:1 is kept: {cut:,}")
        height, width = min(height, longest), min(width, longest)
        extents = np.minimum(np.asarray(sizes, np.int32), [height, width]).astype(np.int32)
    shape = height, width, channels
    return Found(kept, shape, extents, b"".join(digests), wrong, tuple(notes))


class Pictures:
    """An array of images, uint8 [image, height, width, channel], that are decoded when rows of it
    are asked for. Safe in several threads."""

    dtype = np.dtype(np.uint8)

    def __init__(self, encoded: EncodedSet, found: Found, preparation: Preparation) -> None:
        self.encoded, self.found, self.preparation = encoded, found, preparation
        self.shape = (len(found.kept), *found.shape)

    def __len__(self) -> int:
        return len(self.found.kept)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `FieldError` naming a picture that cannot be decoded."""
        chosen = np.arange(len(self))[rows]
        images = np.zeros((chosen.size, *self.shape[1:]), np.uint8)
        for image, row in zip(images, chosen.flat, strict=True):
            index = int(self.found.kept[row])
            outcome = self._decode(image, int(row), self.encoded.attempt(index))
            if isinstance(outcome, str):
                raise unreadable(self.encoded.names[index], outcome)
        return images.reshape(*np.shape(chosen), *self.shape[1:])

    def stream(
        self, progress: Callable[[int], None] | None = None
    ) -> Iterator[tuple[int, np.ndarray, _Outcome]]:
        """Of each picture its row, its pixels and what became of it, in the order of the encoded
        ones, decoded by all cores.

        Raises `FieldError` naming one that has changed since the survey; and one that cannot be
        decoded, unless those are skipped.
        """
        row_of = {int(index): row for row, index in enumerate(self.found.kept)}

        def decoded(item: tuple[int, Encoded | ValueError]) -> tuple[int, np.ndarray, _Outcome]:
            (index, data), image = item, np.zeros(self.shape[1:], np.uint8)
            outcome = self._decode(image, row_of[index], data)
            if isinstance(outcome, str) and not self.preparation.skip_unreadable:
                raise unreadable(self.encoded.names[index], outcome)
            return row_of[index], image, outcome

        done = 0
        wanted = (item for item in self.encoded.stream() if item[0] in row_of)
        with ThreadPoolExecutor() as threads:
            while block := list(islice(wanted, _AT_ONCE)):
                yield from threads.map(decoded, block)
                done += len(block)
                if progress:
                    progress(done)

    def _decode(self, image: np.ndarray, row: int, data: Encoded | ValueError) -> _Outcome:
        """Decode one picture into `image`, the middle of it if it is larger. Raises `FieldError` if
        it is not what the survey read."""
        index = int(self.found.kept[row])
        name, (height, width, channels) = self.encoded.names[index], self.found.shape
        if isinstance(data, ValueError):
            raise FieldError("data", f"cannot read {name}: {reason(data)}")
        if _digest(data) != self.found.digests[32 * index : 32 * index + 32]:
            raise FieldError("data", f"{name} has changed since it was first read")
        try:
            pixels, on_white = decode(data, channels, self.preparation)  # pyright: ignore[reportArgumentType]
        except Exception as error:  # Pillow's plugins raise whatever they meet
            return reason(error)
        top, left = max(0, pixels.shape[0] - height) // 2, max(0, pixels.shape[1] - width) // 2
        pixels = pixels[top : top + height, left : left + width]
        if self.found.extents is not None:
            height, width = self.found.extents[row]
        if pixels.shape[:2] != (height, width):
            return f"expected {height}×{width} pixels, got {pixels.shape[0]}×{pixels.shape[1]}"
        image[:height, :width] = pixels
        return on_white


def _digest(each: Encoded) -> bytes:
    if isinstance(each, bytes):
        return hashlib.sha256(each).digest()
    pixels = np.ascontiguousarray(each)
    return hashlib.sha256(f"{pixels.shape} ".encode() + pixels.tobytes()).digest()


def unreadable(name: str, why: str) -> FieldError:
    """Names a picture, and the setting that leaves it out."""
    problem, skips = f"cannot read {name}: {why}; ", Field("skip_unreadable", True)
    larger = (Field("max_pixels"), " reads larger ones, ") if "decompression bomb" in why else ()
    return FieldError("data", problem, *larger, skips, " leaves such pictures out")


def reason(error: Exception) -> str:
    """The first line of what an error says, without an address in memory."""
    if isinstance(error, Unreadable):
        return error.reason
    said = str(error).partition("\n")[0].partition(" <_io.")[0] or type(error).__name__
    return said.replace("cannot identify image file", "no picture that Pillow can decode")
