"""Every format and oddity: the right pixels, by Pillow's own operations on the same files."""

import io
import itertools
import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
SIZE = 16
NOISE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)


def pictures_of(folder):
    files = (path for path in folder.rglob("*.*") if path.suffix != ".txt" and path.name[0] != ".")
    return sorted(files, key=lambda path: path.relative_to(folder).parts)


def opened(path):
    return Image.open(io.BytesIO(path.read_bytes()))


def whole(path, mode):
    """The picture upright, on white, of 8 bits."""
    picture = ImageOps.exif_transpose(opened(path))
    if picture.mode.startswith("I"):
        picture = Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if mode != "RGBA" and picture.has_transparency_data:
        picture = picture.convert("RGBA")
        white = Image.new("RGB", picture.size, "white")
        white.paste(picture, mask=picture.getchannel("A"))
        picture = white
    return picture.convert(mode)


def halved(picture):
    while min(picture.size) >= 2 * SIZE:
        picture = picture.resize([n // 2 for n in picture.size], Image.Resampling.BOX)
    return picture


def centered(picture):
    picture = halved(picture)
    scale = SIZE / min(picture.size)
    picture = picture.resize([round(n * scale) for n in picture.size], Image.Resampling.BICUBIC)
    left, top = ((n - SIZE) // 2 for n in picture.size)
    return picture.crop((left, top, left + SIZE, top + SIZE))


def squeezed(picture):
    return halved(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC)


WAYS = list(itertools.product((None, 1, 3, 4), ("center", "none"), ("here", "none")))


@pytest.mark.parametrize(
    ("pictures", "channels", "crop", "cache"),
    [
        *(("few", *way) for way in WAYS),
        ("zoo", *WAYS[0]),
        *(pytest.param("zoo", *way, marks=pytest.mark.slow) for way in WAYS[1:]),
    ],
)
def test_every_picture_has_the_right_pixels(request, tmp_path, pictures, channels, crop, cache):
    folder = request.getfixturevalue(pictures)
    mode = {1: "L", 4: "RGBA"}.get(channels, "RGB")
    fitted = centered if crop == "center" else squeezed
    preparation = Preparation(image_size=SIZE, channels=channels, crop=crop)
    data = load_dataset(folder, preparation, cache=cache if cache == "none" else tmp_path)
    files, images = pictures_of(folder), data.images[:]
    assert images.shape == data.images.shape == (len(files), SIZE, SIZE, len(mode))
    assert images.dtype == data.images.dtype == np.uint8
    for path, image in zip(files, images, strict=True):
        expected = np.asarray(fitted(whole(path, mode))).reshape(image.shape)
        # `paste` rounds by its own rule, where a picture is half transparent.
        tolerance = 0 if mode == "RGBA" or "A" not in opened(path).mode else 2
        np.testing.assert_allclose(image.astype(int), expected, atol=tolerance, err_msg=str(path))
    classes = [path.relative_to(folder).parts[0] for path in files]
    assert [data.class_names[label] for label in data.labels] == classes
    notes = "\n".join(data.notes)
    assert "classes by subfolder: 0 bright, 1 dark, 2 striped ones" in notes
    several = sum(getattr(opened(path), "is_animated", False) for path in files)
    assert several and f"several frames, of which the first is taken: {several}" in notes
    assert "files that are no pictures, left out: .txt: 1" in notes
    assert f"images are resized to {SIZE}×{SIZE}" in notes


def test_a_zip_and_a_tar_are_the_same_set(few, tmp_path):
    preparation = Preparation(image_size=SIZE)
    expected = load_dataset(few, preparation, cache=tmp_path / "cache")
    shutil.make_archive(tmp_path / "few", "zip", few.parent, few.name)
    shutil.make_archive(tmp_path / "few", "gztar", few.parent, few.name)
    for name in ("few.zip", "few.tar.gz"):
        data = load_dataset(tmp_path / name, preparation, cache=tmp_path / "cache")
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert (data.class_names, data.digest()) == (expected.class_names, expected.digest())
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_windows_are_cut_from_what_the_longer_side_has(tmp_path):
    wide = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    for name, pixels in (("a", wide), ("b", wide.T), ("c", np.repeat(wide, 3, axis=1))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    data = load_dataset(tmp_path, Preparation(image_size=20, crop="random"), cache="none")
    assert data.image_shape == (20, 20, 1) and data.images.shape == (3, 30, 40, 1)
    np.testing.assert_array_equal(data.extents, [[20, 30], [30, 20], [20, 40]])
    images = data.images[[2, 0, 1]]
    np.testing.assert_array_equal(images[1, :20, :30, 0], wide)
    np.testing.assert_array_equal(images[2, :30, :20, 0], wide.T)
    np.testing.assert_array_equal(images[0, :20, :, 0], np.repeat(wide, 3, axis=1)[:, 25:65])
    assert "pictures of which the middle 2:1 is kept: 1" in data.notes


def test_unreadable_pictures_are_named_or_counted(few, tmp_path):
    folder, cache, preparation = tmp_path / "few", tmp_path / "cache", Preparation(image_size=SIZE)
    shutil.copytree(few, folder)
    cut = next(folder.rglob("*RGB.png")).read_bytes()[:-60]
    (folder / "dark" / "zz cut.png").write_bytes(cut)
    with pytest.raises(FieldError, match=r"data: cannot read dark/zz cut.png: "):
        load_dataset(folder, preparation, cache=cache)
    assert not list(cache.iterdir())
    (folder / "bright" / "00 empty.png").write_bytes(b"")
    (folder / "dark" / "zzz.jpg").symlink_to(folder / "nowhere.jpg")
    skipping = Preparation(image_size=SIZE, skip_unreadable=True)
    expected = load_dataset(few, preparation, cache="none")
    for place in ("none", cache):
        with pytest.raises(FieldError, match=r"data: cannot read bright/00 empty.png: cannot id"):
            load_dataset(folder, preparation, cache=place)
        data = load_dataset(folder, skipping, cache=place)
        (note,) = (note for note in data.notes if "cannot be read" in note)
        assert note.startswith("pictures that cannot be read, left out: 3 (bright/00 empty.png: ")
        assert "dark/zzz.jpg: No such file or directory; dark/zz cut.png: " in note
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
    # What was skipped once is not skipped for good.
    (folder / "bright" / "00 empty.png").unlink()
    (folder / "dark" / "zzz.jpg").unlink()
    load_dataset(folder, skipping, cache=cache)
    with pytest.raises(FieldError, match="data: cannot read dark/zz cut.png: "):
        load_dataset(folder, preparation, cache=cache)


def test_pixels_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    for pixels, got in ((np.arange(64, dtype=np.int32), "32"), (np.ones(64, "f4"), "floating")):
        Image.fromarray(pixels.reshape(8, 8)).save(path)
        with pytest.raises(FieldError, match=f"cannot read a.tif: expected 8 bits .* got {got}"):
            load_dataset(tmp_path)
    path.write_bytes(tiff(tiffinfo={339: 2}))
    with pytest.raises(FieldError, match="cannot read a.tif: expected 8 bits .* got signed 16"):
        load_dataset(tmp_path)
    path.unlink()
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(FieldError, match="cannot read a.png: cannot identify image file"):
        load_dataset(tmp_path)


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = [255, 0, 0, 0]  # red, hidden
    pixels[2] = [0, 0, 0, 51]  # a fifth of black
    pixels[3] = [9, 8, 7, 255]
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    palette = Image.fromarray(np.array([[0, 0, 1, 1]] * 4, np.uint8)).convert("P")
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "z_palette.png", transparency=0)
    data = load_dataset(tmp_path)
    rows = [[255, 255, 255], [255, 255, 255], [204, 204, 204], [9, 8, 7]]
    np.testing.assert_array_equal(data.images[0], np.repeat(np.array(rows)[:, None], 4, axis=1))
    np.testing.assert_array_equal(data.images[1][0], [[255] * 3] * 2 + [[0, 0, 255]] * 2)
    assert data.notes == ("pictures with transparency, which is white now: 2",)


@pytest.mark.parametrize("orientation", [5, 6])
def test_an_orientation_behind_the_pixels_counts(tmp_path, orientation):
    """A PNG whose eXIf chunk comes last."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    file, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(file, exif=exif)
    data = file.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    (tmp_path / "b.png").write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    upright = {5: pixels.T, 6: np.rot90(pixels, -1)}[orientation]
    for cache in ("none", tmp_path / "cache"):
        images = load_dataset(tmp_path, cache=cache).images[:]
        np.testing.assert_array_equal(images[..., 0], [upright] * 2)


def test_a_picture_that_changes_under_way_is_named(tmp_path):
    for name in "ab":
        Image.new("L", (20, 40), 100).save(tmp_path / f"{name}.png")
    images = load_dataset(tmp_path, Preparation(image_size=20, crop="random"), cache="none").images
    Image.new("L", (20, 20), 100).save(tmp_path / "b.png")
    assert images[0].max() == 100
    with pytest.raises(FieldError, match="data: b.png has changed since it was first read"):
        images[1]


def test_a_preparation_that_makes_no_sense_is_named():
    wrong = {"image_size": 6.5, "crop": "middle", "channels": 2, "labels": "names", "flip": 1}
    for name, value in [*wrong.items(), ("image_size", 0), ("crop", "random")]:
        with pytest.raises(FieldError, match=f"^{name}: expected "):
            Preparation(**{name: value})


def test_sets_that_cannot_be_are_named(few, tmp_path, monkeypatch):
    for data, problem in (
        (few, "expected pictures of one size, or an image size to bring them to"),
        ("photos/mine", "no such file or folder: photos/mine; on Hugging Face's"),
        (tmp_path, "no pictures in"),
    ):
        with pytest.raises(FieldError, match=f"data: {problem}"):
            load_dataset(data, cache=tmp_path)

    def scandir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FieldError, match=f"data: cannot read {few}: Permission denied"):
        load_dataset(few)


def test_classes_come_from_the_first_folders_that_differ(tmp_path):
    def make(*names):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for level, name in enumerate(names):
            os.makedirs(os.path.join(os.fsencode(folder), os.path.dirname(name)), exist_ok=True)
            with open(os.path.join(os.fsencode(folder), name), "wb") as file:
                Image.new("L", (4, 4), level).save(file, "PNG")
        return load_dataset(folder, cache="none")

    data = make(b"set/train/cat/1.png", b"set/train/dog/a/1.png", b"set/train/dog/b/1.png")
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 1, 1]
    assert make(b"one/1.png", b"one/2.png").labels is None
    data = make(b"1.png", b"cat/2.png")
    assert data.labels is None and "not every picture lies in a subfolder" in data.notes[0]
    data = make(b"1/1.png", b"2/1.png", b"10/1.png")
    assert data.class_names == ("1", "2", "10") and data.labels.tolist() == [0, 2, 1]
    assert "0 1, 1 2, 2 10; their numbers are not those in their names" in data.notes[0]
    data = make("café/1.png".encode(), "cafe\u0301/2.png".encode(), b"tea/1.png")
    assert data.class_names == ("café", "tea") and sorted(data.labels) == [0, 0, 1]
    data = make(b"tea/1.png", b"tea/.ipynb_checkpoints/1.png", b"tea/._1.png", b"caf\xe9/1.png")
    assert data.class_names == ("caf\\xe9", "tea") and data.labels.tolist() == [0, 1]
    assert data.images[:][:, 0, 0, 0].tolist() == [3, 0]
    "\n".join(data.notes).encode()


SETS = {
    "train/a/1 train/b/1 val/a/1 test/b/1": (["a", "b"], 2, "test: 1, val: 1"),
    "Training/a/1 Training/b/1 Testing/a/1 2": (
        ["a", "b"],
        2,
        "Testing: 1, no folder: 1",
    ),
    "a/train/1 a/test/2 b/train/3 b/valid/4": (["a", "b"], 2, "test: 1, valid: 1"),
    "train2017/1 train2017/2 val2017/1": (None, 2, "val2017: 1"),
    "seg_train/x/1 seg_train/y/1 seg_test/x/1 seg_pred/1": (
        ["x", "y"],
        2,
        "seg_pred: 1, seg_test: 1",
    ),
    "trainA/1 trainB/1 testA/1 testB/1": (["trainA", "trainB"], 2, "testA: 1, testB: 1"),
    "car/1 train/1 bus/1": (["bus", "car", "train"], 3, None),
    "a/1 b/train/1 b/test/1": (["a", "b"], 3, None),
    "0/1 1/1 2/1 10/1": (["0", "1", "2", "10"], 4, None),
}


@pytest.mark.parametrize("names", SETS)
def test_the_training_part_is_taken_and_numbers_are_in_order(tmp_path, names):
    for name in names.split():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4)).save(f"{tmp_path / name}.png")
    classes, count, left_out = SETS[names]
    data = load_dataset(tmp_path, cache="none")
    assert (data.class_names, len(data.images)) == (classes and tuple(classes), count)
    notes = [note for note in data.notes if "left out" in note]
    assert notes == ([f"other parts of the data, left out: {left_out}"] if left_out else [])


def test_parts_without_one_for_training_are_asked_about(tmp_path):
    for name in ("test", "val"):
        (tmp_path / name).mkdir()
        Image.new("L", (4, 4)).save(tmp_path / name / "1.png")
    with pytest.raises(
        FieldError, match="data: expected a folder for training beside test, val in"
    ):
        load_dataset(tmp_path)


def test_labels_are_left_out_when_asked(few, tmp_path):
    data = load_dataset(few, Preparation(image_size=8, labels="none"), cache=tmp_path)
    assert data.labels is None and data.class_names is None
    assert "labels are left out, as asked" in data.notes and "classes" not in str(data.notes)


def test_arrays_are_prepared_like_pictures(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 24, 20, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    data = load_dataset(tmp_path / "x.npy", Preparation(image_size=SIZE, channels=1), cache="none")
    for image, each in zip(data.images[:], pixels, strict=True):
        expected = np.asarray(centered(Image.fromarray(each).convert("L")))
        np.testing.assert_array_equal(image[..., 0], expected)
    np.testing.assert_array_equal(load_dataset(tmp_path / "x.npy").images, pixels)
    np.save(tmp_path / "rgba.npy", rng.integers(0, 256, (2, 24, 20, 4), np.uint8))
    kept = load_dataset(tmp_path / "rgba.npy", Preparation(image_size=SIZE), cache="none")
    assert kept.image_shape == (SIZE, SIZE, 4)
    np.save(tmp_path / "y.npy", rng.uniform(0, 1, (5, 24, 24)).astype(np.float32))
    with pytest.raises(FieldError, match="image_size: expected uint8 images of 1, 3 or 4 channels"):
        load_dataset(tmp_path / "y.npy", Preparation(image_size=SIZE))


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
