"""One picture from its bytes to uint8 [height, width, channel].

bytes ─ Pillow ─ upright (EXIF) ─ 8 bits ─ sRGB ─ on white ─ channels ─ size ─▶ pixels

Metadata that cannot be read are left aside.
"""

import io
import zlib
from contextlib import suppress
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from jax_ddpm.data.dataset import Preparation

Encoded = bytes | np.ndarray
"""A file, or pixels, uint8 [height, width, channel] with 1, 3 or 4 channels."""

# EPS, for which Pillow runs Ghostscript, formats that it only names, films, and measurements.
_REFUSED = {"BUFR", "EPS", "FITS", "FLI", "GRIB", "HDF5", "IPTC", "MCIDAS", "MPEG", "SPIDER", "WMF"}
_PNG = b"\x89PNG\r\n\x1a\n"
_METADATA = ((b"tRNS", b"iCCP", b"eXIf"), (b"eXIf",))
"""The chunks of a PNG that are read beside its pixels, if not all can be; the more the better."""
_MAY_TURN = (b"eXIf", b"tiff:Orientation", b"Raw profile type exif")
_TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Pillow's `Transpose` for an orientation
_BY_A_QUARTER = (2, 4, 5, 6)  # of these
_BITS, _COLOURS, _SIGNS = 258, 262, 339  # tags of a TIFF
_LONGEST = 2  # sides of a picture that windows are cut out of, in image sizes
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class Survey(NamedTuple):
    """What the header of a picture says, before it is decoded."""

    height: int
    width: int
    grey: bool
    several: bool  # whether other frames or pages follow the first
    opacity: bool  # whether pixels may be transparent
    largest: int | None = None  # of grey of 16 bits, the largest value, be 0 black or white


def survey(encoded: Encoded) -> Survey:
    """Height and width once it is upright. Raises an error of Pillow's if it is no picture."""
    if isinstance(encoded, np.ndarray):
        height, width, channels = encoded.shape
        return Survey(height, width, grey=channels == 1, several=False, opacity=channels == 4)
    # It may stand at the end of a PNG, all of which Pillow decodes to find it.
    is_png = encoded.startswith(_PNG)
    picture = _open(encoded, decoded=is_png and any(mark in encoded for mark in _MAY_TURN))
    height, width = picture.size if _turn(picture) in _BY_A_QUARTER else picture.size[::-1]
    grey = _is_grey(picture) or (is_png and encoded[25] == 4)  # of 16 bits, with opacity
    several, opacity = getattr(picture, "is_animated", False), picture.has_transparency_data
    sixteen = picture.mode.startswith("I")
    largest = round(65535 * _sixteen_bits(picture).max()) if sixteen else None
    return Survey(height, width, grey, several, opacity, largest)


def resized_shape(height: int, width: int, preparation: Preparation) -> tuple[int, int]:
    """Height and width of a decoded picture: more than the image size where a window is drawn."""
    size = preparation.image_size
    if size is None:
        return height, width
    if preparation.crop != "random":
        return size, size
    height, width = _scaled(height, width, size)
    return min(height, _LONGEST * size), min(width, _LONGEST * size)


def decode(encoded: Encoded, channels: int, preparation: Preparation) -> np.ndarray:
    """Pixels of `resized_shape`. Raises an error of Pillow's, or `ValueError`, if it cannot."""
    if isinstance(encoded, np.ndarray):
        picture: Any = Image.fromarray(encoded[..., 0] if encoded.shape[2] == 1 else encoded)
    else:
        opened = _open(encoded, decoded=True)
        picture = _in_srgb(_eight_bits(opened), opened.info.get("icc_profile"))
        if (turn := _turn(opened)) is not None:
            picture = picture.transpose(turn)
    if channels != 4 and picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    pixels = np.asarray(_resize(picture.convert(_MODES[channels]), preparation))
    return pixels[..., None] if channels == 1 else pixels


def _open(data: bytes, *, decoded: bool, fewer: Any = _METADATA) -> Any:
    """With all metadata, or else with fewer."""
    Image.init()
    formats = [each for each in Image.ID if each not in _REFUSED]
    try:
        picture: Any = Image.open(io.BytesIO(data), formats=formats)
        if decoded or picture.format == "TIFF":  # which Pillow turns as it decodes
            picture.load()
    except Exception:  # Pillow's plugins raise whatever they meet
        if not fewer or not data.startswith(_PNG):
            raise
        return _open(_with_chunks(data, fewer[0]), decoded=decoded, fewer=fewer[1:])
    transparent = picture.info.get("transparency")
    if decoded and isinstance(transparent, tuple) and data[24] == 16:  # Pillow keeps the upper 8
        lower: Any = Image.open(io.BytesIO(_with_chunks(data, ())), formats=["PNG"])
        lower.tile = [tile._replace(args="RGB;16L") for tile in lower.tile]
        seen = (np.asarray(picture, int) * 256 + np.asarray(lower) != transparent).any(axis=2)
        picture.putalpha(Image.fromarray(seen).convert("L"))
    tags = getattr(picture, "tag_v2", {})
    is_wide = picture.mode == "I" and picture.format not in ("PNG", "PPM")  # which have 16 bits
    if is_wide or picture.mode == "F" or 2 in tags.get(_SIGNS, ()):
        got = f"signed or wider ones (Pillow's mode {picture.mode})"
        raise ValueError(f"expected 8 bits a channel, or 16, got {got}")
    return picture


def _with_chunks(data: bytes, kinds: tuple[bytes, ...]) -> bytes:
    """Of a PNG its pixels, and of these kinds of metadata what is whole."""
    chunks, start = [_PNG], len(_PNG)
    while start < len(data):
        chunk = data[start : start + 12 + int.from_bytes(data[start : start + 4])]
        start += len(chunk)
        is_whole = chunk[-4:] == zlib.crc32(chunk[4:-4]).to_bytes(4)
        if chunk[4:5].isupper() or (is_whole and chunk[4:8] in kinds):
            chunks.append(chunk)
    return b"".join(chunks)


def _turn(picture: Any) -> Any:
    """What brings it upright, as EXIF says."""
    with suppress(Exception):  # whatever Pillow meets in there
        return _TURNS.get(picture.getexif().get(0x0112))


def _is_grey(picture: Any) -> bool:
    return picture.mode in ("1", "L", "LA", "La") or picture.mode.startswith("I")


def _eight_bits(picture: Any) -> Any:
    """Sixteen bits scaled to eight, with the value that is transparent as opacity."""
    if not picture.mode.startswith("I"):
        return picture
    white = getattr(picture, "tag_v2", {}).get(_COLOURS) == 0  # where 0 is white
    grey = Image.fromarray(np.round(255 * np.abs(white - _sixteen_bits(picture))).astype(np.uint8))
    if (transparent := picture.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.asarray(picture) != transparent).convert("L"))
    return grey


def _sixteen_bits(picture: Any) -> np.ndarray:
    """In [0, 1], where 0 may be white. A TIFF says how many bits its values have."""
    return np.asarray(picture) / (2 ** getattr(picture, "tag_v2", {}).get(_BITS, (16,))[0] - 1)


def _in_srgb(picture: Any, profile: bytes | None) -> Any:
    """Colours of a profile in sRGB; as they are if the profile is broken, or of other channels."""
    mode = "L" if _is_grey(picture) else "CMYK" if picture.mode == "CMYK" else "RGB"
    transform = _to_srgb(profile, mode) if profile else None
    if transform is None:
        return picture
    opacity = picture.convert("RGBA").getchannel("A") if picture.has_transparency_data else None
    picture = ImageCms.applyTransform(picture.convert(mode), transform)
    if opacity is not None:
        picture.putalpha(opacity)
    return picture


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """None also where nothing changes by more than a rounding."""
    try:
        srgb: Any = ImageCms.createProfile("sRGB")
        transform: Any = ImageCms.buildTransform(io.BytesIO(profile), srgb, mode, "RGB")
    except (OSError, ImageCms.PyCMSError):
        return None
    colours = np.moveaxis(51 * np.indices((6, 6, 6), np.uint8), 0, -1).reshape(36, 6, 3)
    before: Any = Image.fromarray(colours).convert(mode)
    after: Any = ImageCms.applyTransform(before, transform)
    change = np.subtract(after, before.convert("RGB"), dtype=int)
    return transform if np.abs(change).max() > 1 else None


def _scaled(height: int, width: int, size: int) -> tuple[int, int]:
    """With the shorter side of this size. Halving comes first, and drops odd rows."""
    while min(height, width) >= 2 * size:
        height, width = height // 2, width // 2
    scale = size / min(height, width)
    return round(height * scale), round(width * scale)


def _resize(picture: Any, preparation: Preparation) -> Any:
    """By area while it is twice too large or more, then bicubic, as the code of Dhariwal & Nichol
    2021 (ADM) does; of that the middle."""
    size = preparation.image_size
    if size is None or picture.size == (size, size):
        return picture
    height, width = resized_shape(picture.height, picture.width, preparation)
    tall, wide = _scaled(picture.height, picture.width, size)
    if preparation.crop == "none":
        tall, wide = size, size
    while min(picture.size) >= 2 * size:
        picture = picture.resize([side // 2 for side in picture.size], Image.Resampling.BOX)
    picture = picture.resize((wide, tall), Image.Resampling.BICUBIC)
    left, top = (wide - width) // 2, (tall - height) // 2
    return picture.crop((left, top, left + width, top + height))
