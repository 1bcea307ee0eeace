"""MNIST's files, made byte by byte."""

import gzip
import re
import struct
import tarfile
import zipfile

import numpy as np
import pytest

from jax_ddpm.data.files import open_files
from jax_ddpm.data.idx import is_idx, read_idx, read_mnist

PIXELS = bytes(range(5 * 3 * 2))


def idx(shape, data):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + data


IMAGES, LABELS = idx((5, 3, 2), PIXELS), idx((5,), bytes([7, 0, 9, 9, 1]))
TRAIN = {"train-images-idx3-ubyte": IMAGES, "train-labels-idx1-ubyte": LABELS}
TEST = {
    "t10k-images-idx3-ubyte": idx((1, 3, 2), bytes(6)),
    "t10k-labels-idx1-ubyte": idx((1,), b"\x03"),
}


def write(folder, files, pack=False):
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        file = folder / (name + ".gz" * pack)
        file.write_bytes(gzip.compress(data) if pack else data)
    return open_files(folder)


def check_train(images, labels):
    assert images.dtype == np.uint8
    assert images.shape == (5, 3, 2, 1)
    for image in range(5):
        for row in range(3):
            for column in range(2):
                assert images[image, row, column, 0] == PIXELS[6 * image + 2 * row + column]
    assert labels.dtype == np.int32
    assert labels.tolist() == [7, 0, 9, 9, 1]


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw/"])
@pytest.mark.parametrize("dot", [False, True])
def test_the_training_images_are_read(tmp_path, pack, below, dot):
    named = {below + (name.replace("-idx", ".idx") if dot else name): TRAIN[name] for name in TRAIN}
    files = write(tmp_path, named, pack)
    assert is_idx(files.names)
    *arrays, note = read_mnist(files)
    check_train(*arrays)
    assert note == "the training images"


def test_those_of_the_test_are_left_out(tmp_path):
    *arrays, note = read_mnist(write(tmp_path, TRAIN | TEST))
    check_train(*arrays)
    assert note == "the training images; those of the test are left out"


def test_those_of_the_test_are_read_where_there_are_no_others(tmp_path):
    images, labels, note = read_mnist(write(tmp_path, TEST))
    assert images.shape == (1, 3, 2, 1)
    assert labels.tolist() == [3]
    assert note == "the images of the test: those for training are not there"


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_archives_hold_them_too(tmp_path, name):
    write(tmp_path / "folder", TRAIN | TEST, pack=True)
    if name == "x.zip":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            for file in (tmp_path / "folder").iterdir():
                archive.write(file, f"MNIST/{file.name}")
    else:
        with tarfile.open(tmp_path / name, "w:gz" if name.endswith("gz") else "w") as archive:
            archive.add(tmp_path / "folder", "MNIST")
    check_train(*read_mnist(open_files(tmp_path / name))[:2])


def test_one_that_is_there_packed_and_unpacked_is_read_once(tmp_path):
    write(tmp_path, TRAIN)
    check_train(*read_mnist(write(tmp_path, TRAIN, pack=True))[:2])


def test_copies_without_their_labels_are_no_second_data_set(tmp_path):
    # An archive that is widely used has each file also in a folder of its name.
    folders = {f"{name}/{name}": data for name, data in TRAIN.items()}
    dotted = {name.replace("-idx", ".idx"): data for name, data in TRAIN.items()}
    check_train(*read_mnist(write(tmp_path, folders | dotted))[:2])


def test_other_files_are_not_taken_for_these():
    assert not is_idx(())
    for name in ("1.png", "train/1.png", "idx3-ubyte", "train-images-idx3-ubyte/1.png"):
        assert not is_idx([name])
    assert is_idx(["1.png", "a/b/t10k-labels.idx1-ubyte.gz"])


def fails(files, *parts):
    with pytest.raises(ValueError) as caught:
        read_mnist(files)
    assert "\n" not in str(caught.value)
    for part in (str(files.path), *parts):
        assert part in str(caught.value)


def test_missing_files_are_named(tmp_path):
    for number, name in enumerate(TRAIN):
        files = write(tmp_path / str(number), {name: TRAIN[name]})
        fails(files, "expected images and labels in one folder", f"got {name}")
    (tmp_path / "none").mkdir()
    fails(open_files(tmp_path / "none"), "got none")


def test_several_data_sets_are_named(tmp_path):
    both = {f"{folder}/{name}": data for folder in "ab" for name, data in TRAIN.items()}
    got = "got a/train-images-idx3-ubyte, b/train-images-idx3-ubyte"
    fails(write(tmp_path, both), "expected one data set", got)


def test_labels_that_do_not_fit_are_named(tmp_path):
    images, labels = TRAIN
    fewer = {images: IMAGES, labels: idx((4,), bytes(4))}
    with pytest.raises(ValueError, match=f"expected 5 labels for .*{images}, got 4 in {labels}"):
        read_mnist(write(tmp_path / "fewer", fewer))
    swapped = {images: LABELS, labels: IMAGES}
    fails(write(tmp_path / "swapped", swapped), images, "[image, height, width], got [5]")
    none = {images: idx((0, 3, 2), b""), labels: idx((0,), b"")}
    fails(write(tmp_path / "none", none), images, "got [0, 3, 2]")


def test_an_array_of_any_rank():
    array = read_idx(idx((2, 1, 1, 3), b"abcdef"), "x")
    assert array.dtype == np.uint8
    assert array.tolist() == [[[list(b"abc")]], [[list(b"def")]]]


PACKED = gzip.compress(IMAGES, mtime=0)
DAMAGED = {
    "nothing": (b"", "x in y: expected the magic number 00 00 08 and axes, got "),
    "short": (b"\0\0\x08", "got 00 00 08"),
    "no axes": (b"\0\0\x08\0", "got 00 00 08 00"),
    "floats": (b"\0\0\x0d\x01" + bytes(8), "got 00 00 0d 01"),
    "a picture": (b"\x89PNG" + bytes(8), "got 89 50 4e 47"),
    "half a header": (IMAGES[:14], "x in y: expected a header of 16 bytes, got 14"),
    "truncated": (IMAGES[:-1], "x in y: expected 30 bytes for the shape [5, 3, 2], got 29"),
    "surplus": (IMAGES + b"x", "x in y: expected 30 bytes for the shape [5, 3, 2], got 31"),
    "huge": (idx((2**32 - 1,) * 3, b"x"), "got 1"),
    "a truncated .gz": (PACKED[:-9], "cannot read x in y: "),
    "a damaged .gz": (PACKED[:10] + b"\xff" * 20, "cannot read x in y: "),
    "a damaged end of a .gz": (PACKED[:-8] + bytes(8), "cannot read x in y: "),
    "truncated in a .gz": (gzip.compress(IMAGES[:-1]), "x in y: expected 30 bytes"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named(name):
    data, problem = DAMAGED[name]
    with pytest.raises(ValueError, match=re.escape(problem)) as caught:
        read_idx(data, "x in y")
    assert "\n" not in str(caught.value)
