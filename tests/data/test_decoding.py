"""Pixels first: what people's files say of themselves, and the files that say it wrongly."""

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def chunk(kind, body, wrong=0):
    checksum = (zlib.crc32(kind + body) ^ wrong).to_bytes(4)
    return struct.pack(">I4s", len(body), kind) + body + checksum


def png(pixels, *chunks, late=()):
    """Of 8 or 16 bits, with more chunks before its pixels and behind them."""
    kind, bits = (0, 4, 2, 6)[pixels.shape[2] - 1], 8 * pixels.itemsize
    rows = [b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels]
    header = chunk(b"IHDR", struct.pack(">IIBBxxx", *pixels.shape[1::-1], bits, kind))
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    return b"\x89PNG\r\n\x1a\n" + b"".join([header, *chunks, data, *late, chunk(b"IEND", b"")])


def saved(pixels, kind, **options):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def exif(kind, value):
    """Nothing but an orientation: 2 is text, 3 a number."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, kind, 1, value) + bytes(4)


def read(folder, *files, **options):
    shutil.rmtree(folder / "pictures", ignore_errors=True)
    (folder / "pictures").mkdir()
    for number, data in enumerate(files):
        (folder / f"pictures/{number}.png").write_bytes(data)
    return load_dataset(folder / "pictures", Preparation(**options), cache=folder / "cache")


METADATA = {
    "an EXIF chunk with a wrong checksum": (b"eXIf", exif(3, b"\11"), 1),
    "an EXIF chunk of nonsense": (b"eXIf", b"nonsense"),
    "a text as orientation": (b"eXIf", exif(2, b"six")),
    "a raw profile that is no hex": (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz\n"),
    "a transparent value of one byte": (b"tRNS", b"\1"),
    "a profile packed in an unknown way": (b"iCCP", b"x\0\7abc"),
    "a profile of nonsense": (b"iCCP", b"x\0\0" + zlib.compress(b"nonsense" * 99)),
}


@pytest.mark.parametrize("what", METADATA)
def test_broken_metadata_cost_no_picture(tmp_path, what):
    """And what is whole counts, such as an orientation that comes last."""
    broken, turned = chunk(*METADATA[what]), chunk(b"eXIf", exif(3, b"\6"))
    images = read(tmp_path, png(NOISE, broken), png(NOISE, late=[broken])).images[:]
    np.testing.assert_array_equal(images, [NOISE, NOISE])
    if b"eXIf" in broken:
        jpeg = saved(NOISE, "JPEG", exif=b"Exif\0\0" + METADATA[what][1])
        np.testing.assert_array_equal(read(tmp_path, jpeg).images[0], Image.open(io.BytesIO(jpeg)))
    else:
        for data in (png(NOISE, turned, late=[broken]), png(NOISE, broken, late=[turned])):
            np.testing.assert_array_equal(read(tmp_path, data).images[0], np.rot90(NOISE, -1))


SIXTEEN = np.arange(65536, step=77, dtype=np.uint16)[:600].reshape(20, 30, 1)
VALUE = SIXTEEN[3, 4].astype(">u2").tobytes()
GREY, CLEAR = np.round(SIXTEEN / 257), SIXTEEN == SIXTEEN[3, 4]
COLOUR, UPPER = np.repeat(SIXTEEN, 3, 2), np.where(CLEAR, 255, SIXTEEN >> 8)  # of all 16 bits
DEEP = {
    "opacity": (png(np.concatenate([SIXTEEN, 65535 + 0 * SIXTEEN], 2)), GREY),
    "a transparent grey": (png(SIXTEEN, chunk(b"tRNS", VALUE)), np.where(CLEAR, 255, GREY)),
    "a transparent colour": (png(COLOUR, chunk(b"tRNS", VALUE * 3)), np.repeat(UPPER, 3, 2)),
    "white as zero": (saved(SIXTEEN[..., 0], "TIFF", tiffinfo={262: 0}), 255 - GREY),
    "a TIFF on its side": (saved(SIXTEEN[..., 0], "TIFF", exif={0x112: 6}), np.rot90(GREY, -1)),
}


@pytest.mark.parametrize("what", DEEP)
def test_sixteen_bits_and_opacity_are_read_right(tmp_path, what):
    data, expected = DEEP[what]
    (image,) = read(tmp_path, data).images[:]
    assert image.shape == expected.shape  # grey stays grey
    np.testing.assert_allclose(image.astype(int), expected, atol=what == "opacity")


def test_twelve_bits_in_sixteen_are_said(tmp_path):
    light = saved(SIXTEEN[..., 0] >> 5, "TIFF", tiffinfo={262: 0})
    for other in (png(SIXTEEN >> 5), light):
        (note,) = read(tmp_path, png(SIXTEEN >> 4), other).notes
        assert "no value is above 2,882 of 65,535 in 16 bits; times 22, they would" in note
    assert not read(tmp_path, png(SIXTEEN >> 4), png(SIXTEEN)).notes


SRGB = [(0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
P3 = [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]


def profile(primaries):
    """Of sRGB, with another curve and other primaries, or of grey if there are none."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    icc = icc.replace(b"\0\3\0\0\0\2ff", b"\0\0\0\0\0\1\xc0\0")  # x ** 1.75
    for name, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=False):
        start = int.from_bytes(icc[icc.index(name) + 4 :][:4]) + 8
        numbers = struct.pack(">3i", *(round(65536 * each) for each in xyz))
        icc = icc[:start] + numbers + icc[start + 12 :]
    return icc if primaries else icc.replace(b"RGB XYZ", b"GRAYXYZ").replace(b"rTRC", b"kTRC")


@pytest.mark.parametrize("primaries", [P3, SRGB, []])
@pytest.mark.parametrize("opacity", [False, True])
def test_other_colours_are_brought_to_srgb(tmp_path, primaries, opacity):
    """By matrices, with what lies outside clipped, and sRGB's curve (IEC 61966-2-1)."""
    pixels = NOISE if primaries else NOISE[..., :1]
    linear = (pixels / 255) ** 1.75
    if primaries:
        linear = (linear @ np.array(primaries) @ np.linalg.inv(SRGB)).clip(0, 1)
    expected = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    if opacity:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)
    icc = chunk(b"iCCP", b"x\0\0" + zlib.compress(profile(primaries)))
    np.testing.assert_allclose(read(tmp_path, png(pixels, icc)).images[0], 255 * expected, atol=2.5)


def test_what_pillow_decodes_is_a_picture_whatever_its_name(tmp_path, write_files):
    kinds = "0.jfif JPEG,1.JPE JPEG,2 TIFF,3 PCX,4.ppm PPM,5.avif AVIF,6 JPEG2000,8.dat WEBP,a PNG"
    files = {name: saved(NOISE, kind) for name, kind in map(str.split, kinds.split(","))}
    files |= {"P6": b"P6 is a format", "d.txt": b"BMW", "e": b"II*\0raw", "f.mp4": b""}
    data = load_dataset(write_files(tmp_path / "set", files), cache="none")
    assert "no pictures, left out: .mp4: 1, .txt: 1, P6: 1, e: 1" in data.notes[0]
    assert data.images[:].shape == (9, 20, 30, 3)
    np.testing.assert_array_equal(data.images[8], NOISE)


def test_what_is_refused_and_large_pictures_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 650)
    for data, problem in (
        (saved(SIXTEEN[..., 0], "TIFF", tiffinfo={339: 2}), "expected 8 bits .* got signed"),
        (saved(NOISE[..., 0], "TIFF", tiffinfo={339: 2}), "expected 8 bits .* got signed"),
        (saved(np.ones((8, 8), np.float32), "TIFF"), "expected 8 bits .* mode F"),
        (b"Pf\n1 1\n-1.0\n" + bytes(4), "expected 8 bits .* mode F"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n", "no picture that Pillow"),
        (saved(np.zeros((40, 40), np.uint8), "PNG"), ".* exceeds limit of 1300 pixels"),
    ):
        with pytest.raises(FieldError, match=f"data: cannot read 0.png: {problem}"):
            read(tmp_path, data)
    assert read(tmp_path, data, max_pixels=1600).images[0].shape == (40, 40, 1)
