"""MNIST's files, made byte by byte."""

import gzip
import re
import struct
import tarfile

import numpy as np
import pytest

from jax_ddpm.data.files import open_files
from jax_ddpm.data.idx import is_idx, read_idx, read_mnist


def idx(shape, data):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + data


IMAGES, LABELS = idx((5, 3, 2), bytes(range(30))), idx((5,), bytes([7, 0, 9, 9, 1]))
TRAIN = {"train-images-idx3-ubyte": IMAGES, "train-labels-idx1-ubyte": LABELS}
TEST = {
    "t10k-images-idx3-ubyte": idx((1, 3, 2), bytes(6)),
    "t10k-labels-idx1-ubyte": idx((1,), b"\x03"),
}


def write(folder, files, pack=False):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / (name + ".gz" * pack)).write_bytes(gzip.compress(data) if pack else data)
    return open_files(folder)


def check_train(files, note="the training images"):
    assert is_idx(files.names)
    images, labels, said = read_mnist(files)
    assert images.dtype == np.uint8 and images.shape == (5, 3, 2, 1)
    for image, row, column in np.ndindex(5, 3, 2):
        assert images[image, row, column, 0] == 6 * image + 2 * row + column
    assert labels.dtype == np.int32 and labels.tolist() == [7, 0, 9, 9, 1]
    assert said == note


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("below", ["", "FashionMNIST/raw/"])
@pytest.mark.parametrize("dot", [False, True])
def test_the_training_images_are_read(tmp_path, pack, below, dot):
    named = {below + (name.replace("-idx", ".idx") if dot else name): TRAIN[name] for name in TRAIN}
    check_train(write(tmp_path / "folder", named, pack))
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "folder", "MNIST")
    check_train(open_files(tmp_path / "x.tar.gz"))


def test_the_test_images_are_read_where_there_are_no_others(tmp_path):
    images, labels, note = read_mnist(write(tmp_path, TEST))
    assert images.shape == (1, 3, 2, 1) and labels.tolist() == [3]
    assert note == "the images of the test: those for training are not there"
    check_train(write(tmp_path, TRAIN), "the training images; those of the test are left out")


def test_copies_are_no_second_data_set(tmp_path):
    """Packed beside unpacked; and a widely used archive has each file also in its own folder."""
    folders = {f"{name}/{name}": data for name, data in TRAIN.items()}
    dotted = {name.replace("-idx", ".idx"): data for name, data in TRAIN.items()}
    write(tmp_path, dotted, pack=True)
    check_train(write(tmp_path, folders | dotted))


def test_other_files_are_not_taken_for_these():
    for name in ("1.png", "train/1.png", "idx3-ubyte", "train-images-idx3-ubyte/1.png"):
        assert not is_idx([name])
    assert is_idx(["1.png", "a/b/t10k-labels.idx1-ubyte.gz"])


FOUND = {
    "got train-images-idx3-ubyte": {"train-images-idx3-ubyte": IMAGES},
    "got none": {},
    "one data set .* got a/train-.*, b/train-": {f"{a}/{n}": TRAIN[n] for a in "ab" for n in TRAIN},
    "expected 5 labels .*, got 4": TRAIN | {"train-labels-idx1-ubyte": idx((4,), bytes(4))},
    r"numbers of \[image, height, width\], got \[5\]": dict.fromkeys(TRAIN, LABELS),
    r"got \[0, 3, 2\]": TRAIN | {"train-images-idx3-ubyte": idx((0, 3, 2), b"")},
}


@pytest.mark.parametrize("problem", FOUND)
def test_files_that_do_not_fit_are_named(tmp_path, problem):
    with pytest.raises(ValueError, match=problem):
        read_mnist(write(tmp_path / "folder", FOUND[problem]))


DAMAGED = {
    "the magic number 00 00 08 and axes, got 00 00 08 00": b"\0\0\x08\0",
    "got 00 00 0d 01": b"\0\0\x0d\x01" + bytes(8),  # floats
    "expected a header of 16 bytes, got 14": IMAGES[:14],
    "expected 30 bytes for the shape [5, 3, 2], got 29": IMAGES[:-1],
    "expected 30 bytes for the shape [5, 3, 2], got 31": IMAGES + b"x",
    "got 1": idx((2**32 - 1,) * 3, b"x"),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_damage_is_named(problem):
    for data in (DAMAGED[problem], gzip.compress(DAMAGED[problem])):
        with pytest.raises(ValueError, match=f"^x in y: [^\n]*{re.escape(problem)}$"):
            read_idx(data, "x in y")


def test_damaged_packing_is_named():
    packed = gzip.compress(IMAGES)
    for data in (packed[:-9], packed[:10] + b"\xff" * 20, packed[:-8] + bytes(8)):
        with pytest.raises(ValueError, match=r"^cannot read x in y: [^\n]+$"):
            read_idx(data, "x in y")
