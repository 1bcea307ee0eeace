"""Every format and oddity: the right pixels, by Pillow's own operations on the same files."""

import io
import os
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image, ImageOps

from jax_ddpm._errors import FieldError
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
    load = partial(load_dataset, preparation=Preparation(image_size=SIZE), cache=tmp_path / "cache")
    expected = load(few)
    for kind in ("zip", "gztar"):
        data = load(shutil.make_archive(tmp_path / "few", kind, few.parent, few.name))
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert (data.class_names, data.digest()) == (expected.class_names, expected.digest())
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_windows_are_cut_from_the_longer_side_of_what_was_there_at_first(tmp_path):
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
    Image.fromarray(wide[::-1]).save(tmp_path / "b.png")
    with pytest.raises(FieldError, match="data: b.png has changed since it was first read"):
        data.images[1]


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


def test_what_is_transparent_is_white(tmp_path):
    pixels = np.array([[[255, 0, 0, 0], [0, 0, 0, 51], [9, 8, 7, 255]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    Image.fromarray(pixels[..., :3]).save(tmp_path / "without.png")
    data = load_dataset(tmp_path)
    expected = [[[[255, 255, 255], [204, 204, 204], [9, 8, 7]]], pixels[..., :3]]
    np.testing.assert_array_equal(data.images[:], expected)
    assert data.notes == ("pictures with transparency, which is white now: 1",)


def test_a_preparation_that_makes_no_sense_is_named():
    wrong = {"image_size": 6.5, "crop": "middle", "channels": 2, "labels": "names", "flip": 1}
    for name, value in [*wrong.items(), ("image_size", 0), ("crop", "random")]:
        with pytest.raises(FieldError, match=f"^{name}: expected "):
            Preparation(**{name: value})


def test_sets_that_cannot_be_are_named(few, tmp_path, monkeypatch):
    (tmp_path / "x.rar").touch()
    for data, problem in (
        (few, "expected pictures of one size, or an image size to bring them to"),
        ("photos/mine", "no such file or folder: photos/mine; on Hugging Face's"),
        (tmp_path, "no pictures in"),
        (tmp_path / "x.rar", "expected a .npz, .* or a .zip, .tar or .parquet, got .*x.rar"),
    ):
        with pytest.raises(FieldError, match=f"data: {problem}"):
            load_dataset(data, cache=tmp_path)
    with pytest.raises(FieldError, match="data: expected a folder for training beside test, val"):
        make(tmp_path / "parts", "test/1 val/1")
    refuse = Mock(side_effect=PermissionError(13, "Permission denied", str(few)))
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FieldError, match=f"data: cannot read {few}: Permission denied"):
        load_dataset(few)


def make(folder, names, **options):
    for level, name in enumerate(names.split()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(f"{folder / name}.png")
    return load_dataset(folder, Preparation(**options), cache="none")


FOLDERS = {
    "set/train/cat/1 set/train/dog/a/1 set/train/dog/b/1": ("cat dog", "011", ""),
    "meta/1 train/1 test.bin/1": ("meta test.bin train", "012", ""),  # as files of CIFAR are called
    "one/1 one/2": (None, "..", ""),
    "1 cat/2": (None, "..", "no classes: not every picture lies in a subfolder"),
    "1/1 2/1 10/1": ("1 2 10", "021", "2 10; their numbers are not those in their names"),
    "0/1 1/1 2/1": ("0 1 2", "012", "classes by subfolder: 0 0, 1 1, 2 2"),
    "cafe\u0301/2 caf\u00e9/1 tea/1": ("caf\u00e9 tea", "001", ""),
    "tea/1 tea/.ipynb/1 tea/._1 caf\udce9/1": ("caf\\xe9 tea", "01", "0 caf\\xe9, 1 tea"),
    # Parts of a set: the images for training are taken.
    "train/a/1 train/b/1 val/a/1 test/b/1": ("a b", "01", "test: 1, val: 1"),
    "Training/a/1 Training/b/1 Testing/a/1 2": ("a b", "01", "Testing: 1, no folder: 1"),
    "a/train/1 a/test/2 b/train/3 b/valid/4": ("a b", "01", "test: 1, valid: 1"),
    "train2017/1 train2017/2 val2017/1": (None, "..", "val2017: 1"),
    "trainA/1 trainB/1 testA/1 testB/1": ("trainA trainB", "01", "testA: 1, testB: 1"),
    "seg_train/x/1 seg_train/y/1 seg_test/x/1": ("x y", "01", "seg_test: 1"),
    "bus/1 car/1 train/1": ("bus car train", "012", ""),
    "a/1 b/train/1 b/test/1": ("a b", "011", ""),
}


@pytest.mark.parametrize("names", FOLDERS)
def test_classes_are_the_first_folders_that_differ_in_the_part_for_training(tmp_path, names):
    classes, labels, said = FOLDERS[names]
    data = make(tmp_path, names)
    assert data.class_names == (classes and tuple(classes.split()))
    got = ["."] * len(data.images) if classes is None else data.labels.tolist()
    assert "".join(map(str, got)) == labels
    notes = "\n".join(data.notes)
    assert said in notes and ("other parts" in notes) == (": 1" in said) and notes.encode()
    data = make(tmp_path, names, labels="none")
    assert data.labels is data.class_names is None and "classes" not in str(data.notes)
    assert "labels are left out, as asked" in data.notes


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
    # Splits stand in the names of files, or of folders, as in the hub's own conversion.
    for name in ("set/train-00000", "hub/train/0", "hub/test/0"):
        made.to_parquet(f"{tmp_path / name}.parquet")
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
