"""Every format and oddity: the right pixels, by Pillow's own operations on the same files."""

import io
import os
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageOps

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
SIZE = 16


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


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize(("crop", "fitted"), [("center", centered), ("none", squeezed)])
def test_every_picture_has_the_right_pixels(zoo, tmp_path, channels, crop, fitted):
    mode = {1: "L", 4: "RGBA"}.get(channels, "RGB")
    preparation = Preparation(image_size=SIZE, channels=channels, crop=crop)
    data = load_dataset(zoo, preparation, cache="none")
    files, images = pictures_of(zoo), data.images[:]
    assert images.shape == data.images.shape == (len(files), SIZE, SIZE, len(mode))
    assert images.dtype == data.images.dtype == np.uint8
    for path, image in zip(files, images, strict=True):
        expected = np.asarray(fitted(whole(path, mode))).reshape(image.shape)
        # `paste` rounds by its own rule, where a picture is half transparent.
        tolerance = 0 if mode == "RGBA" or "A" not in opened(path).mode else 2
        np.testing.assert_allclose(image.astype(int), expected, atol=tolerance, err_msg=str(path))
    np.testing.assert_array_equal(load_dataset(zoo, preparation, cache=tmp_path).images[:], images)
    classes = [path.relative_to(zoo).parts[0] for path in files]
    assert [data.class_names[label] for label in data.labels] == classes
    notes = "\n".join(data.notes)
    assert "classes by subfolder: 0 bright, 1 dark, 2 striped ones" in notes
    assert "pictures of several frames, of which the first is taken: 9" in notes
    assert "files that are no pictures, left out: .txt: 1" in notes
    assert f"images are resized to {SIZE}×{SIZE}" in notes


def test_a_zip_and_a_tar_are_the_same_set(few, tmp_path):
    preparation = Preparation(image_size=SIZE)
    expected = load_dataset(few, preparation, cache=tmp_path / "cache")
    for kind in ("zip", "gztar"):
        path = shutil.make_archive(tmp_path / "few", kind, few.parent, few.name)
        data = load_dataset(path, preparation, cache=tmp_path / "cache")
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
    folder, preparation = tmp_path / "few", Preparation(image_size=SIZE)
    shutil.copytree(few, folder)
    empty, cut, gone = (folder / name for name in ("bright/00.png", "dark/y.png", "dark/z.png"))
    empty.touch()
    cut.write_bytes(next(folder.rglob("*RGB.png")).read_bytes()[:-60])
    gone.symlink_to(folder / "nowhere.png")
    skipping = Preparation(image_size=SIZE, skip_unreadable=True)
    expected = load_dataset(few, preparation, cache="none")
    for cache in ("none", tmp_path / "cache"):
        with pytest.raises(FieldError, match=r"data: cannot read bright/00.png: cannot identify"):
            load_dataset(folder, preparation, cache=cache)
        data = load_dataset(folder, skipping, cache=cache)
        (note,) = (note for note in data.notes if "cannot be read" in note)
        assert note.startswith("pictures that cannot be read, left out: 3 (bright/00.png: cannot ")
        assert "dark/z.png: No such file or directory; dark/y.png: " in note
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
    # `cut` has a whole header: only decoding finds it. What was skipped is not skipped for good.
    empty.unlink()
    gone.unlink()
    load_dataset(folder, skipping, cache=tmp_path / "cache")
    for cache in (tmp_path / "cache", tmp_path / "new"):
        with pytest.raises(FieldError, match="data: cannot read dark/y.png: "):
            load_dataset(folder, preparation, cache=cache)
    assert not list((tmp_path / "new").iterdir())


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


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = [255, 0, 0, 0]  # red, hidden
    pixels[2] = [0, 0, 0, 51]  # a fifth of black
    pixels[3] = [9, 8, 7, 255]
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "without.png")
    data = load_dataset(tmp_path)
    rows = [[255, 255, 255], [255, 255, 255], [204, 204, 204], [9, 8, 7]]
    np.testing.assert_array_equal(data.images[0], np.repeat(np.array(rows)[:, None], 4, axis=1))
    np.testing.assert_array_equal(data.images[1], pixels[..., :3])
    assert data.notes == ("pictures with transparency, which is white now: 1",)


def test_an_orientation_behind_the_pixels_counts(tmp_path):
    """A PNG whose eXIf chunk comes last."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), np.uint8)
    file, exif = tmp_path / "a.png", Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(file, exif=exif)
    data = file.read_bytes()
    start = data.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    (tmp_path / "b.png").write_bytes(data[:start] + data[end:-12] + data[start:end] + data[-12:])
    images = load_dataset(tmp_path, cache="none").images[:]
    np.testing.assert_array_equal(images[..., 0], [np.rot90(pixels, -1)] * 2)


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
    refuse = Mock(side_effect=PermissionError(13, "Permission denied", str(few)))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FieldError, match=f"data: cannot read {few}: Permission denied"):
        load_dataset(few)


def test_classes_come_from_the_first_folders_that_differ(tmp_path):
    def make(*names, **options):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for level, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (4, 4), level).save(folder / name)
        return load_dataset(folder, Preparation(**options), cache="none")

    data = make("set/train/cat/1.png", "set/train/dog/a/1.png", "set/train/dog/b/1.png")
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 1, 1]
    # As files of CIFAR and MNIST are called.
    data = make("meta/1.png", "train/1.png", "train-images-idx3-ubyte/1.png")
    assert data.class_names == ("meta", "train", "train-images-idx3-ubyte")
    assert make("one/1.png", "one/2.png").labels is None
    data = make("1.png", "cat/2.png")
    assert data.labels is None and "not every picture lies in a subfolder" in data.notes[0]
    data = make("1/1.png", "2/1.png", "10/1.png")
    assert data.class_names == ("1", "2", "10") and data.labels.tolist() == [0, 2, 1]
    assert "0 1, 1 2, 2 10; their numbers are not those in their names" in data.notes[0]
    data = make("café/1.png", "cafe\u0301/2.png", "tea/1.png")
    assert data.class_names == ("café", "tea") and sorted(data.labels) == [0, 0, 1]
    data = make("tea/1.png", "tea/.ipynb_checkpoints/1.png", "tea/._1.png", "caf\udce9/1.png")
    assert data.class_names == ("caf\\xe9", "tea") and data.labels.tolist() == [0, 1]
    assert data.images[:][:, 0, 0, 0].tolist() == [3, 0]
    "\n".join(data.notes).encode()
    data = make("cat/1.png", "dog/1.png", labels="none")
    assert data.labels is None and data.class_names is None
    assert "labels are left out, as asked" in data.notes and "classes" not in str(data.notes)


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


def test_arrays_are_prepared_like_pictures(tmp_path):
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (5, 24, 20, 4), np.uint8)
    np.save(tmp_path / "rgba.npy", rgba)
    np.save(tmp_path / "rgb.npy", rgba[..., :3])
    small = load_dataset(tmp_path / "rgba.npy", Preparation(image_size=SIZE), cache="none").images
    grey = load_dataset(tmp_path / "rgb.npy", Preparation(channels=1), cache="none").images
    for index, pixels in enumerate(rgba):
        np.testing.assert_array_equal(small[index], centered(Image.fromarray(pixels)))
        expected = Image.fromarray(pixels[..., :3]).convert("L")
        np.testing.assert_array_equal(grey[index][..., 0], expected)
    np.save(tmp_path / "float.npy", rng.uniform(0, 1, (5, 24, 24)).astype(np.float32))
    with pytest.raises(FieldError, match="image_size: expected uint8 images of 1, 3 or 4 channels"):
        load_dataset(tmp_path / "float.npy", Preparation(image_size=SIZE))


def test_hugging_faces_sets(few, tmp_path, monkeypatch):
    """A Parquet file as `datasets` writes it, and one that knows nothing of images: the same images
    as of the files themselves."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    load = partial(load_dataset, preparation=Preparation(image_size=SIZE, channels=3), cache="none")
    expected = load(few)
    classes = list(expected.class_names)
    files = pictures_of(few)
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}
    rows = {"image": list(map(str, files)), "label": expected.labels.tolist()}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    made.to_parquet(tmp_path / "set/train-00000.parquet")
    # Splits that stand in the names of folders, as the hub's own conversion has them.
    for split in ("train", "test"):
        (tmp_path / f"hub/{split}").mkdir(parents=True)
        shutil.copy(tmp_path / "set/train-00000.parquet", tmp_path / f"hub/{split}/0.parquet")
    cells = {
        "img": [{"bytes": path.read_bytes(), "path": None} for path in files],
        "fine_label": expected.labels.tolist(),
    }
    pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / "bare.parquet")
    for name in ("set", "hub", "bare.parquet"):
        data = load(tmp_path / name)
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert data.class_names == (None if name == "bare.parquet" else expected.class_names)
        assert ("files of other splits, left out: test/0.parquet" in data.notes) == (name == "hub")
    for column, words in (("img", "cannot read row 1: there is no image"), ("fine_label", "row 1")):
        table = pyarrow.table(cells | {column: [cells[column][0], None, *cells[column][2:]]})
        pyarrow.parquet.write_table(table, tmp_path / "null.parquet")
        with pytest.raises(FieldError, match=words):
            load(tmp_path / "null.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(FieldError, match="data: cannot read .*bad.parquet"):
        load(tmp_path / "bad.parquet")
