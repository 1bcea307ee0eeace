"""One picture from its bytes to uint8 [height, width, channel]: upright, of 8 bits, of one size.

bytes ─ Pillow ─ upright (EXIF) ─ 8 bits ─ on white ─ channels ─ size ─▶ pixels
"""

import io
from typing import Any, Literal, NamedTuple

import numpy as np

from jax_ddpm.data.preparation import Preparation

__all__ = ["Decoded", "Encoded", "Survey", "decode", "resized_shape", "survey"]

Encoded = bytes | np.ndarray
"""A file's bytes, or pixels, uint8 [height, width, channel] with 1, 3 or 4 channels."""

_ORIENTATION = 0x0112
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
_MAY_TURN = (b"eXIf", b"tiff:Orientation", b"Raw profile type exif")
_SIXTEEN_BITS = 257  # 65535 / 255
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Survey(NamedTuple):
    """What the header of a picture says, before it is decoded."""

    height: int
    width: int
    grey: bool
    several: bool
    """Whether other frames or pages follow the first."""


class Decoded(NamedTuple):
    """A picture's pixels, and whether any of them was transparent and is on white now."""

    pixels: np.ndarray
    on_white: bool


def survey(encoded: Encoded) -> Survey:
    """Height and width once it is upright. Raises an error of Pillow's if it is no picture."""
    if isinstance(encoded, np.ndarray):
        return Survey(*encoded.shape[:2], grey=encoded.shape[2] == 1, several=False)
    picture = _open(encoded)
    width, height = picture.size
    # It may stand at the end of a PNG, all of which Pillow decodes to find it.
    may_turn = picture.format != "PNG" or any(mark in encoded for mark in _MAY_TURN)
    if may_turn and picture.getexif().get(_ORIENTATION, 1) >= 5:  # it lies on its side
        height, width = width, height
    several = getattr(picture, "is_animated", False)
    return Survey(height, width, _is_grey(picture), several)


def resized_shape(height: int, width: int, preparation: Preparation) -> tuple[int, int]:
    """Height and width of a decoded picture: more than the image size where a window is drawn."""
    size = preparation.image_size
    if size is None:
        return height, width
    return _scaled(height, width, size) if preparation.crop == "random" else (size, size)


def decode(encoded: Encoded, channels: Literal[1, 3, 4], preparation: Preparation) -> Decoded:
    """Pixels of `resized_shape`. Raises an error of Pillow's, or `ValueError`, if it cannot."""
    from PIL import Image, ImageOps

    if isinstance(encoded, np.ndarray):
        picture: Any = Image.fromarray(encoded[..., 0] if encoded.shape[2] == 1 else encoded)
    else:
        picture = ImageOps.exif_transpose(_open(encoded))
    picture, on_white = _on_white(_eight_bits(picture), channels)
    picture = _resize(picture.convert(_MODES[channels]), preparation)
    pixels = np.asarray(picture)
    return Decoded(pixels[..., None] if channels == 1 else pixels, on_white)


def _open(data: bytes) -> Any:
    from PIL import Image

    picture = Image.open(io.BytesIO(data), formats=_FORMATS)
    # Pillow has no other mode for a PNG of 16 bits.
    if picture.mode == "F" or picture.mode == "I" and picture.format != "PNG":
        got = "floating-point pixels" if picture.mode == "F" else "32"
        raise ValueError(f"expected 8 bits a channel, or 16, got {got}")
    return picture


def _is_grey(picture: Any) -> bool:
    return picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")


def _eight_bits(picture: Any) -> Any:
    """Sixteen bits scaled to eight."""
    from PIL import Image

    if not picture.mode.startswith("I"):
        return picture
    return Image.fromarray(np.round(np.asarray(picture) / _SIXTEEN_BITS).astype(np.uint8))


def _on_white(picture: Any, channels: int) -> tuple[Any, bool]:
    from PIL import Image

    if channels == 4 or not picture.has_transparency_data:
        return picture, False
    picture = picture.convert("RGBA")
    transparent = picture.getchannel("A").getextrema()[0] < 255
    white = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(white, picture).convert("RGB"), transparent


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """With the shorter side of this size. Halving comes first, and drops odd rows."""
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    return round(height * scale), round(width * scale)


def _resize(picture: Any, preparation: Preparation) -> Any:
    """By area while it is twice too large or more, then bicubic, as the code of Dhariwal & Nichol
    2021 (ADM) does."""
    from PIL import Image

    size = preparation.image_size
    if size is None or picture.size == (size, size):
        return picture
    whole = preparation.crop == "none"
    height, width = (size, size) if whole else _scaled(picture.height, picture.width, size)
    while min(picture.size) >= 2 * size:
        halves = (picture.width // 2, picture.height // 2)
        picture = picture.resize(halves, Image.Resampling.BOX)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    if preparation.crop != "center":
        return picture
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))
