"""Every format and oddity: the right pixels, by Pillow's own operations on the same files."""

import io
import os
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image, ImageOps

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
SIZE = 16
CLASSES = ("bright", "dark", "striped ones")


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


@pytest.mark.parametrize(("channels", "mode"), [(None, "RGB"), (1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize(("crop", "fitted"), [("center", centered), ("none", squeezed)])
@pytest.mark.parametrize("cache", ["none", "here"])
def test_every_picture_has_the_right_pixels(zoo, tmp_path, channels, mode, crop, fitted, cache):
    preparation = Preparation(image_size=SIZE, channels=channels, crop=crop)
    data = load_dataset(zoo, preparation, cache=cache if cache == "none" else tmp_path)
    files = pictures_of(zoo)
    assert data.images.shape == (len(files), SIZE, SIZE, len(mode)) and len(files) == 315
    assert data.images.dtype == np.uint8
    images = data.images[:]
    for path, image in zip(files, images, strict=True):
        expected = np.asarray(fitted(whole(path, mode))).reshape(image.shape)
        # `paste` rounds by its own rule, where a picture is half transparent.
        tolerance = 0 if mode == "RGBA" or "A" not in opened(path).mode else 2
        np.testing.assert_allclose(image.astype(int), expected, atol=tolerance, err_msg=str(path))
    assert data.class_names == CLASSES
    names = [path.relative_to(zoo).parts[0] for path in files]
    np.testing.assert_array_equal(data.labels, [CLASSES.index(name) for name in names])
    notes = "\n".join(data.notes)
    assert "classes by subfolder: 0 bright, 1 dark, 2 striped ones" in notes
    several = sum(getattr(opened(path), "is_animated", False) for path in files)
    assert several and f"several frames, of which the first is taken: {several}" in notes
    assert "files that are no pictures, left out: .txt: 1" in notes
    assert f"images are resized to {SIZE}×{SIZE}" in notes


def test_a_zip_and_a_tar_of_it_are_the_same_set(zoo, tmp_path):
    preparation = Preparation(image_size=SIZE)
    expected = load_dataset(zoo, preparation, cache=tmp_path / "cache")
    with zipfile.ZipFile(tmp_path / "zoo.zip", "w") as archive:
        for path in sorted(zoo.rglob("*"), reverse=True):
            archive.write(path, f"zoo/{path.relative_to(zoo)}")
    for name, mode in (("zoo.tar", "w"), ("zoo.tar.gz", "w:gz")):
        with tarfile.open(tmp_path / name, mode) as archive:
            archive.add(zoo, "zoo")
    for name in ("zoo.zip", "zoo.tar", "zoo.tar.gz"):
        data = load_dataset(tmp_path / name, preparation, cache=tmp_path / "other")
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert (data.class_names, data.digest()) == (expected.class_names, expected.digest())
    assert len(list((tmp_path / "other").iterdir())) == 1


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


def test_unreadable_pictures_are_named_or_counted(zoo, tmp_path):
    folder = tmp_path / "zoo"
    shutil.copytree(zoo, folder)
    (folder / "bright" / "00 empty.png").write_bytes(b"")
    (folder / "dark" / "zz cut.png").write_bytes(next(folder.rglob("*RGB.png")).read_bytes()[:-60])
    (folder / "dark" / "zzz.jpg").symlink_to(folder / "nowhere.jpg")
    preparation = Preparation(image_size=SIZE)
    for cache in ("none", tmp_path / "cache"):
        with pytest.raises(FieldError, match=r"data: cannot read bright/00 empty.png: cannot id"):
            load_dataset(folder, preparation, cache=cache)
    (folder / "bright" / "00 empty.png").unlink()
    (folder / "dark" / "zzz.jpg").unlink()
    with pytest.raises(FieldError, match=r"data: cannot read dark/zz cut.png: "):
        load_dataset(folder, preparation, cache=tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    (folder / "bright" / "00 empty.png").write_bytes(b"")
    (folder / "dark" / "zzz.jpg").symlink_to(folder / "nowhere.jpg")
    skipping = Preparation(image_size=SIZE, skip_unreadable=True)
    expected = load_dataset(zoo, preparation, cache=tmp_path / "cache")
    for cache in ("none", tmp_path / "cache"):
        data = load_dataset(folder, skipping, cache=cache)
        assert len(data.images) == len(data.labels) == 315
        (note,) = (note for note in data.notes if "cannot be read" in note)
        assert note.startswith("pictures that cannot be read, left out: 3 (bright/00 empty.png: ")
        assert "dark/zzz.jpg: No such file or directory; dark/zz cut.png: " in note
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
    # What was skipped once is not skipped for good.
    (folder / "bright" / "00 empty.png").unlink()
    (folder / "dark" / "zzz.jpg").unlink()
    load_dataset(folder, skipping, cache=tmp_path / "cache")
    with pytest.raises(FieldError, match="data: cannot read dark/zz cut.png: "):
        load_dataset(folder, preparation, cache=tmp_path / "cache")


def test_pixels_of_other_kinds_are_refused(tmp_path):
    path = tmp_path / "a.tif"
    for pixels, got in ((np.arange(64, dtype=np.int32), "32"), (np.ones(64, "f4"), "floating")):
        Image.fromarray(pixels.reshape(8, 8)).save(path)
        with pytest.raises(FieldError, match=f"cannot read a.tif: expected 8 bits .* got {got}"):
            load_dataset(tmp_path)
    path.unlink()
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n")
    with pytest.raises(FieldError, match="cannot read a.png: cannot identify image file"):
        load_dataset(tmp_path)


def test_an_orientation_behind_the_pixels_counts(tmp_path):
    """A PNG whose eXIf chunk comes last."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", exif=exif)
    data = file.getvalue()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    (tmp_path / "a.png").write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    (tmp_path / "b.png").write_bytes(data)
    for cache in ("none", tmp_path / "cache"):
        images = load_dataset(tmp_path, cache=cache).images[:]
        np.testing.assert_array_equal(images[..., 0], [np.rot90(pixels, -1)] * 2)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_picture_that_changes_under_way_is_named(tmp_path, crop):
    for name in "ab":
        Image.new("L", (20, 40), 100).save(tmp_path / f"{name}.png")
    images = load_dataset(tmp_path, Preparation(image_size=20, crop=crop), cache="none").images
    Image.new("L", (20, 20), 100).save(tmp_path / "b.png")
    assert images[0].max() == 100
    with pytest.raises(FieldError, match="data: b.png has changed since it was first read"):
        images[1]


def test_classes_whose_names_are_no_unicode(tmp_path):
    for name in (b"caf\xe9", b"tea"):
        os.mkdir(os.path.join(os.fsencode(tmp_path), name))
        with open(os.path.join(os.fsencode(tmp_path), name, b"1.png"), "wb") as file:
            Image.new("L", (4, 4)).save(file, "PNG")
    data = load_dataset(tmp_path, cache="none")
    assert data.class_names == ("caf\\xe9", "tea") and data.images[:].shape == (2, 4, 4, 1)
    "\n".join(data.notes).encode()


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    (tmp_path / "secret").mkdir()
    listed = os.scandir

    def scandir(path):
        if str(path).endswith("secret"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FieldError, match="cannot read .*/secret: Permission denied"):
        load_dataset(tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"image_size": 0}, "image_size: expected a whole number above 0, got 0"),
        ({"image_size": 6.5}, "image_size: expected a whole number above 0, got 6.5"),
        ({"crop": "middle"}, "crop: expected one of 'center', 'random', 'none', got 'middle'"),
        ({"crop": "random"}, "crop: expected an image size with it, got none"),
        ({"channels": 2}, "channels: expected one of None, 1, 3, 4, got 2"),
        ({"labels": "names"}, "labels: expected one of 'folders', 'none'"),
        ({"flip": 1}, "flip: expected True or False, got 1"),
    ],
)
def test_a_preparation_that_makes_no_sense_is_named(options, words):
    with pytest.raises(FieldError, match=words):
        Preparation(**options)


def test_pictures_of_several_sizes_need_one(zoo, tmp_path):
    with pytest.raises(FieldError, match="expected pictures of one size, or an image size to bri"):
        load_dataset(zoo, cache=tmp_path)
    with pytest.raises(FieldError, match="no such file or folder: photos/mine; on Hugging Face's"):
        load_dataset("photos/mine")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FieldError, match="no pictures in"):
        load_dataset(tmp_path / "empty")


def test_classes_come_from_the_first_folders_that_differ(tmp_path):
    def make(*names):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        for name in names:
            path = tmp_path / "x" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), 9).save(path)
        return load_dataset(tmp_path / "x", cache="none")

    data = make("set/train/cat/1.png", "set/train/dog/a/1.png", "set/train/dog/b/1.png")
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 1, 1]
    assert make("one/1.png", "one/2.png").labels is None
    assert make("1.png", "2.png").labels is None
    data = make("1.png", "cat/2.png")
    assert data.labels is None and "not every picture lies in a subfolder" in data.notes[0]


def test_labels_are_left_out_when_asked(zoo, tmp_path):
    data = load_dataset(zoo, Preparation(image_size=8, labels="none"), cache=tmp_path)
    assert data.labels is None and data.class_names is None
    assert "labels are left out, as asked" in data.notes
    assert not any(note.startswith("classes") for note in data.notes)
    digits = load_dataset("digits", Preparation(labels="none"))
    assert digits.labels is None and digits.images.dtype == np.float32


def test_arrays_are_prepared_like_pictures(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (5, 24, 20, 3), np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels, labels=np.arange(5))
    data = load_dataset(tmp_path / "x.npz", Preparation(image_size=SIZE, channels=1), cache="none")
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    for image, each in zip(data.images[:], pixels, strict=True):
        expected = np.asarray(centered(Image.fromarray(each).convert("L")))
        np.testing.assert_array_equal(image[..., 0], expected)
    as_they_are = load_dataset(tmp_path / "x.npz")
    np.testing.assert_array_equal(as_they_are.images, pixels)
    np.save(tmp_path / "rgba.npy", rng.integers(0, 256, (2, 24, 20, 4), np.uint8))
    kept = load_dataset(tmp_path / "rgba.npy", Preparation(image_size=SIZE), cache="none")
    assert kept.image_shape == (SIZE, SIZE, 4)
    np.save(tmp_path / "y.npy", rng.uniform(0, 1, (5, 24, 24)).astype(np.float32))
    with pytest.raises(FieldError, match="image_size: expected uint8 images of 1, 3 or 4 channels"):
        load_dataset(tmp_path / "y.npy", Preparation(image_size=SIZE))


def test_hugging_faces_sets(zoo, tmp_path, monkeypatch):
    """A Parquet file as `datasets` writes it, and one that knows nothing of images."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    files = [path for path in pictures_of(zoo) if path.suffix in (".png", ".jpg")][:12]
    names = [path.relative_to(zoo).parts[0] for path in files]
    classes = sorted(set(names))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    )
    rows = {"image": [str(path) for path in files], "label": names}
    made = datasets.Dataset.from_dict(rows, features=features)
    (tmp_path / "set").mkdir()
    made.to_parquet(tmp_path / "set/train-00000.parquet")
    bare = pyarrow.table(
        {
            "img": [{"bytes": path.read_bytes(), "path": None} for path in files],
            "fine_label": [classes.index(name) for name in names],
        }
    )
    pyarrow.parquet.write_table(bare, tmp_path / "bare.parquet")
    preparation = Preparation(image_size=SIZE, channels=3)
    for path, known in ((tmp_path / "set", tuple(classes)), (tmp_path / "bare.parquet", None)):
        data = load_dataset(path, preparation, cache="none")
        assert data.labels.tolist() == [classes.index(name) for name in names]
        assert data.class_names == known
        for image, file in zip(data.images[:], files, strict=True):
            expected = np.asarray(centered(whole(file, "RGB")))
            tolerance = 2 if "A" in opened(file).mode else 0
            np.testing.assert_allclose(image.astype(int), expected, atol=tolerance)
    # Splits that stand in the names of folders, as the hub's own conversion has them.
    for split in ("train", "test"):
        (tmp_path / f"hub/{split}").mkdir(parents=True)
        shutil.copy(tmp_path / "set/train-00000.parquet", tmp_path / f"hub/{split}/0.parquet")
    data = load_dataset(tmp_path / "hub", preparation, cache="none")
    assert len(data.images) == 12
    assert "files of other splits, left out: test/0.parquet" in data.notes
    for column, words in (("img", "cannot read row 1: there is no image"), ("fine_label", "row 1")):
        cells = bare[column].to_pylist()
        cells[1] = None
        place = bare.column_names.index(column)
        filled = pyarrow.array(cells, bare[column].type)
        pyarrow.parquet.write_table(
            bare.set_column(place, column, filled), tmp_path / "null.parquet"
        )
        with pytest.raises(FieldError, match=words):
            load_dataset(tmp_path / "null.parquet", preparation, cache="none")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(FieldError, match="data: cannot read .*bad.parquet"):
        load_dataset(tmp_path / "bad.parquet")
    assert os.path.exists(tmp_path / "hf")
