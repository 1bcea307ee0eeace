"""Pixels first: what people's files say of themselves, and the files that say it wrongly."""

import io
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def chunk(kind, body, wrong=0):
    checksum = zlib.crc32(kind + body) ^ wrong
    return struct.pack(">I4s", len(body), kind) + body + struct.pack(">I", checksum)


def png(pixels, *chunks, late=()):
    """Of 8 or 16 bits, with more chunks before its pixels and behind them."""
    kind, bits = (0, 4, 2, 6)[pixels.shape[2] - 1], 8 * pixels.itemsize
    rows = [b"\0" + row.astype(f">u{pixels.itemsize}").tobytes() for row in pixels]
    header = struct.pack(">IIBBxxx", *pixels.shape[1::-1], bits, kind)
    data = chunk(b"IDAT", zlib.compress(b"".join(rows)))
    parts = [chunk(b"IHDR", header), *chunks, data, *late, chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(changes=(), **options):
    """Grey of 16 bits, with other values of its tags, {(tag, value): another}."""
    file = io.BytesIO()
    Image.fromarray(SIXTEEN[..., 0]).save(file, "TIFF", **options)
    data = file.getvalue()
    for (tag, value), other in dict(changes).items():
        entry = struct.pack("<HHI", tag, 3, 1)
        data = data.replace(entry + bytes([value]), entry + bytes([other]))
    return data


def exif(kind, value):
    """Nothing but an orientation: 2 is text, 3 a number."""
    return b"II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI4s", 0x112, kind, 1, value) + bytes(4)


def jpeg(data):
    file = io.BytesIO()
    Image.fromarray(NOISE).save(file, "JPEG", exif=b"Exif\0\0" + data)
    return file.getvalue()


def read(folder, *files, **options):
    (folder / "pictures").mkdir(exist_ok=True)
    for number, data in enumerate(files):
        (folder / f"pictures/{number}.png").write_bytes(data)
    return load_dataset(folder / "pictures", Preparation(**options), cache=folder / "cache")


NONSENSE = zlib.compress(b"nonsense" * 99)
BROKEN = {
    "an EXIF chunk with a wrong checksum": (b"eXIf", exif(3, b"\11"), 1),
    "an EXIF chunk of nonsense": (b"eXIf", b"nonsense"),
    "a text as orientation": (b"eXIf", exif(2, b"six")),
    "a raw profile that is no hex": (b"tEXt", b"Raw profile type exif\0\nexif\n 4\nzzzz\n"),
    "a transparent value of one byte": (b"tRNS", b"\1"),
    "a profile packed in an unknown way": (b"iCCP", b"x\0\7abc"),
    "a profile of nonsense": (b"iCCP", b"x\0\0" + NONSENSE),
    "a size of one byte": (b"pHYs", b"\1"),
    "a text that is cut": (b"zTXt", b"Comment\0\7abc"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_broken_metadata_cost_no_picture(tmp_path, what):
    broken, turned = chunk(*BROKEN[what]), chunk(b"eXIf", exif(3, b"\3"))
    files = png(NOISE, broken), png(NOISE, late=[broken]), png(NOISE, turned, late=[broken])
    images = read(tmp_path, *files).images[:]
    last = NOISE if b"eXIf" in broken else NOISE[::-1, ::-1]
    np.testing.assert_array_equal(images, [NOISE, NOISE, last])


@pytest.mark.parametrize("data", [exif(2, b"six"), exif(3, b"\11"), b"nonsense", b""])
def test_an_orientation_that_is_none_is_left_alone(tmp_path, data):
    (image,) = read(tmp_path, jpeg(data)).images[:]
    np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(jpeg(exif(3, b"\1"))))))


SIXTEEN = np.arange(65536, step=77, dtype=np.uint16)[:600].reshape(20, 30, 1)
VALUE = SIXTEEN[3, 4].astype(">u2").tobytes()
GREY, CLEAR = np.round(SIXTEEN / 257), SIXTEEN == SIXTEEN[3, 4]
DEEP = {
    "opacity": (png(np.concatenate([SIXTEEN, 65535 + 0 * SIXTEEN], 2)), GREY),
    "a transparent grey": (png(SIXTEEN, chunk(b"tRNS", VALUE)), np.where(CLEAR, 255, GREY)),
    "a transparent colour": (
        png(np.repeat(SIXTEEN, 3, 2), chunk(b"tRNS", VALUE * 3)),
        np.repeat(np.where(SIXTEEN >> 8 == SIXTEEN[3, 4] >> 8, 255, SIXTEEN >> 8), 3, 2),
    ),
    "white as zero": (tiff({(262, 1): 0}), 255 - GREY),
    "a TIFF on its side": (tiff(exif={0x112: 6}), np.rot90(GREY, -1)),
    "a TIFF on its head": (tiff(exif={0x112: 3}), GREY[::-1, ::-1]),
}


@pytest.mark.parametrize("what", DEEP)
def test_sixteen_bits_are_read_right(tmp_path, what):
    data, expected = DEEP[what]
    (image,) = read(tmp_path, data).images[:]
    assert image.shape == expected.shape  # grey stays grey
    np.testing.assert_allclose(image.astype(int), expected, atol=what == "opacity")


def test_signed_pixels_are_refused(tmp_path):
    with pytest.raises(FieldError, match="cannot read 0.png: expected 8 bits .* got signed 16"):
        read(tmp_path, tiff(tiffinfo={339: 2}))


def test_twelve_bits_in_sixteen_are_said(tmp_path):
    (note,) = read(tmp_path, png(SIXTEEN >> 4), png(SIXTEEN >> 5)).notes
    assert "no value is above 2,882 of 65,535; times 22, they would be bright" in note
    assert not read(tmp_path, png(SIXTEEN >> 4), png(SIXTEEN)).notes


def profile(space, **tags):
    """An ICC profile, by hand."""
    tags = {"wtpt": column(0.9642, 1, 0.8249), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, data in tags.items():
        table += struct.pack(">4sII", name.encode(), start + len(body), len(data))
        body += data
    words = start + len(body), 0x02100000, b"mntr", space, b"XYZ ", b"acsp", 63190, 65536, 54061
    return struct.pack(">I4xI4s4s4s12x4s28x3i48x", *words) + table + body


def curve(gamma):
    return b"curv" + struct.pack(">4xIH2x", 1, round(256 * gamma))


def column(*xyz):
    return b"XYZ " + struct.pack(">4x3i", *(round(65536 * each) for each in xyz))


SRGB = [(0.4360, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7141)]
P3 = [(0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841)]
ADOBE = [(0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446)]


@pytest.mark.parametrize("primaries", [P3, ADOBE, SRGB, None])
@pytest.mark.parametrize("opacity", [False, True])
def test_other_colours_are_brought_to_srgb(tmp_path, primaries, opacity):
    """By matrices, with what lies outside clipped, and sRGB's curve (IEC 61966-2-1)."""
    pixels, linear = NOISE, (NOISE / 255) ** 1.75
    if primaries:
        tags = {f"{each}XYZ": column(*xyz) for each, xyz in zip("rgb", primaries, strict=True)}
        icc = profile(b"RGB ", **tags, **{f"{each}TRC": curve(1.75) for each in "rgb"})
        linear = (linear @ np.array(primaries) @ np.linalg.inv(SRGB)).clip(0, 1)
    else:
        icc, pixels, linear = profile(b"GRAY", kTRC=curve(1.75)), NOISE[..., :1], linear[..., :1]
    if opacity:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)
    (image,) = read(tmp_path, png(pixels, chunk(b"iCCP", b"x\0\0" + zlib.compress(icc)))).images[:]
    there = np.where(linear < 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(image, 255 * there, atol=2.5)


def test_what_pillow_decodes_is_a_picture_whatever_its_name(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    kinds = "0.jfif JPEG,1.JPE JPEG,2 TIFF,3.jpg_large JPEG,4.ppm PPM,5.avif AVIF,6.jp2 JPEG2000"
    for each in f"{kinds},7.tga TGA,8.dat WEBP,9.txt BMP,a PNG".split(","):
        Image.fromarray(NOISE).save(folder / each.split()[0], each.split()[1])
    others = {"P6": b"P6 is a format", "d.txt": b"BMW", "e": b"II*\0raw", "f.mp4": b""}
    for name, data in others.items():
        (folder / name).write_bytes(data)
    for kind in ("zip", "gztar", None):
        path = shutil.make_archive(tmp_path / "x", kind, folder) if kind else folder
        data = load_dataset(path, cache=tmp_path / "cache")
        assert data.images.shape == (11, 20, 30, 3)
        assert "no pictures, left out: .mp4: 1, .txt: 1, P6: 1, e: 1" in data.notes[0]
        np.testing.assert_array_equal(data.images[-1], NOISE)


def test_a_large_picture_is_read_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)
    with pytest.raises(FieldError, match="cannot read 0.png: .*; max_pixels reads larger ones"):
        read(tmp_path, png(NOISE))
    np.testing.assert_array_equal(read(tmp_path, png(NOISE), max_pixels=600).images[0], NOISE)
