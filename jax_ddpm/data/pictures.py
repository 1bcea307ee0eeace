"""Pictures of many sizes and kinds as one indexed set of uint8 images, decoded when asked for.

    encoded ─ survey ─▶ sizes, channels, digest ─▶ decoded once into the cache, or when asked for

What a training must find again is decided by the survey, which reads every byte once: the shape,
and a digest of what was read.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from jax_ddpm._checks import FieldError
from jax_ddpm.data.decoding import Encoded, Survey, decode, resized_shape, survey
from jax_ddpm.data.preparation import Preparation

__all__ = ["EncodedSet", "Found", "Pictures", "look_at"]

_LONGEST = 2
"""What is kept of a picture that is longer than it is wide, in image sizes, for random windows."""


@runtime_checkable
class EncodedSet(Protocol):
    """Pictures before they are decoded."""

    @property
    def names(self) -> Sequence[str]:
        """What each is called in messages, in the order that a training knows them in."""
        ...

    def read(self, index: int) -> Encoded:
        """One of them. May be called from several threads at once."""
        ...

    def stream(self) -> Iterator[tuple[int, Encoded]]:
        """Each of them with its index, in the order that is fastest to read."""
        ...


class Found(NamedTuple):
    """What the survey found: what can be read, and all that is needed to decode it."""

    kept: np.ndarray
    """Indices of pictures whose heads can be read, int64."""
    shape: tuple[int, int, int]
    """Of each image: height, width, channels."""
    extents: np.ndarray | None
    """Height and width of each picture within that shape, int32 [image, 2], if they differ."""
    sha256: str
    """Of every byte that was read, in hexadecimal."""
    unreadable: dict[str, str]
    """Names of the others, and what is wrong with each."""
    notes: tuple[str, ...]


def look_at(
    encoded: EncodedSet, preparation: Preparation, progress: Callable[[int], None] | None = None
) -> Found:
    """Read every picture, and the head of each.

    Raises `FieldError` naming the first that is unreadable, unless those are skipped, and the
    first of another size, where there is no image size to bring them to.
    """
    count = len(encoded.names)
    heads: list[Survey | None] = [None] * count
    digests, unreadable = [b""] * count, {}
    for done, (index, each) in enumerate(encoded.stream()):
        data = each if isinstance(each, bytes) else np.ascontiguousarray(each).data
        digests[index] = hashlib.sha256(data).digest()
        try:
            heads[index] = survey(each)
        except Exception as error:  # Pillow's plugins raise whatever they meet
            refuse_unreadable(encoded.names[index], error, preparation)
            unreadable[encoded.names[index]] = reason(error)
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
    sizes = [resized_shape(head.height, head.width, preparation) for head in readable]
    height, width = map(max, zip(*sizes, strict=True))
    if preparation.image_size is None:
        _check_one_size(encoded, kept, sizes)
    extents = None
    if preparation.image_size is not None and preparation.crop == "random":
        longest = _LONGEST * preparation.image_size
        if max(height, width) > longest:
            cut = sum(max(size) > longest for size in sizes)
            notes.append(f"pictures of which the middle {_LONGEST}:1 is kept: {cut:,}")
        height, width = min(height, longest), min(width, longest)
        extents = np.minimum(np.asarray(sizes, np.int32), [height, width]).astype(np.int32)
    digest = hashlib.sha256(b"".join(digests)).hexdigest()
    return Found(kept, (height, width, channels), extents, digest, unreadable, tuple(notes))


class Pictures:
    """An array of images, uint8 [image, height, width, channel], that are decoded when rows of it
    are asked for. Safe in several threads."""

    dtype = np.dtype(np.uint8)

    def __init__(self, encoded: EncodedSet, found: Found, preparation: Preparation) -> None:
        self._encoded, self._found, self._preparation = encoded, found, preparation
        self.shape = (len(found.kept), *found.shape)

    def __len__(self) -> int:
        return len(self._found.kept)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `FieldError` naming a picture that cannot be decoded."""
        chosen = np.arange(len(self))[rows]
        images = np.zeros((chosen.size, *self.shape[1:]), np.uint8)
        for image, row in zip(images, chosen.flat, strict=True):
            index = self._found.kept[row]
            try:
                decode_into(image, self._encoded.read(index), self._preparation)
            except Exception as error:
                name = self._encoded.names[index]
                raise FieldError("data", f"cannot read {name}: {reason(error)}") from None
        return images.reshape(*np.shape(chosen), *self.shape[1:])


def decode_into(image: np.ndarray, encoded: Encoded, preparation: Preparation) -> bool:
    """Decode one picture into `image`, its middle if it is larger. Whether it is on white now."""
    height, width, channels = image.shape
    decoded = decode(encoded, channels, preparation)
    top = max(0, decoded.pixels.shape[0] - height) // 2
    left = max(0, decoded.pixels.shape[1] - width) // 2
    pixels = decoded.pixels[top : top + height, left : left + width]
    if preparation.image_size is None and decoded.pixels.shape != image.shape:
        got = "×".join(map(str, decoded.pixels.shape))
        raise ValueError(f"expected {'×'.join(map(str, image.shape))} pixels, got {got}")
    image[: pixels.shape[0], : pixels.shape[1]] = pixels
    return decoded.on_white


def refuse_unreadable(name: str, error: Exception, preparation: Preparation) -> None:
    """Raises `FieldError` unless unreadable pictures are to be skipped."""
    if not preparation.skip_unreadable:
        raise FieldError("data", f"cannot read {name}: {reason(error)}") from None


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return str(error).partition("\n")[0] or type(error).__name__


def _check_one_size(
    encoded: EncodedSet, kept: np.ndarray, sizes: Sequence[tuple[int, int]]
) -> None:
    for index, size in zip(kept, sizes, strict=True):
        if size != sizes[0]:
            (height, width), first = sizes[0], encoded.names[kept[0]]
            raise FieldError(
                "data",
                f"expected pictures of one size, or an image size to bring them to: {first} is "
                f"{height}×{width}, {encoded.names[index]} {size[0]}×{size[1]}",
            )
