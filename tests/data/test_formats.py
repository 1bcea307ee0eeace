"""MNIST's and CIFAR's files, byte by byte: images come back, damage is named, no code is run."""

import gzip
import pickle
import re
import struct

import numpy as np
import pytest

from jax_ddpm._errors import FieldError
from jax_ddpm.data import load_dataset

pytestmark = pytest.mark.usefixtures("untyped")


def idx(shape, data):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + data


TRAIN = {"train-images-idx3-ubyte": idx((5, 3, 2), bytes(range(30)))}
TRAIN |= {"train-labels-idx1-ubyte": idx((5,), bytes([7, 0, 9, 9, 1]))}
TEST = {"t10k-images-idx3-ubyte": idx((1, 3, 2), bytes(6))}
TEST |= {"t10k-labels-idx1-ubyte": idx((1,), b"\x03")}
DOTTED = {name.replace("-idx", ".idx"): data for name, data in TRAIN.items()}
PACKED = {f"{name}.gz": gzip.compress(data) for name, data in DOTTED.items()}
LAYOUTS = [TRAIN, {f"raw/{name}": data for name, data in PACKED.items()}, TRAIN | TEST]
# Packed beside unpacked; and a widely used archive has each file also in its own folder.
LAYOUTS += [DOTTED | PACKED | {f"{name}/{name}": data for name, data in TRAIN.items()}]


@pytest.mark.parametrize("files", LAYOUTS)
@pytest.mark.parametrize("place", ["folder", "x.tar.gz"])
def test_mnists_training_images_are_read(tmp_path, write_files, files, place):
    data = load_dataset(write_files(tmp_path / place, files))
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 3, 2, 1)
    np.testing.assert_array_equal(data.images, pixels, strict=True)
    np.testing.assert_array_equal(data.labels, np.array([7, 0, 9, 9, 1], np.int32), strict=True)
    assert data.notes == ("the training images",)


def test_mnists_test_images_are_read_by_their_file_or_alone(tmp_path, write_files):
    for path in (write_files(tmp_path, TEST), tmp_path / "t10k-labels-idx1-ubyte"):
        data = load_dataset(path)
        assert data.images.shape == (1, 3, 2, 1) and data.labels.tolist() == [3]
        assert data.notes == ("the test images",)
    write_files(tmp_path, TRAIN)
    assert load_dataset(tmp_path / "t10k-images-idx3-ubyte").labels.tolist() == [3]
    write_files(tmp_path / "again", TRAIN)
    with pytest.raises(FieldError, match="images and labels .* got again/train-im.*, train-im"):
        load_dataset(tmp_path)


TEN = [f"class{number}" for number in range(10)]
HUNDRED = [f"fine_{number}" for number in range(100)]
BATCHES = {number: [number, 9 - number] for number in range(1, 6)}  # and their labels


def pixels(seed):
    """Of two images: red, then green, then blue, each row by row."""
    return np.random.default_rng(seed).integers(0, 256, (2, 3072), np.uint8)


def binary(seed, *labels):
    rows = pixels(seed)
    return b"".join(bytes(each) + row.tobytes() for each, row in zip(labels, rows, strict=True))


def pickled(**values):
    """As Python 2 wrote them, whose text is bytes."""
    return pickle.dumps({key.encode(): value for key, value in values.items()}, 2)


BINARY_10 = {f"data_batch_{n}.bin": binary(n, [a], [b]) for n, (a, b) in BATCHES.items()}
BINARY_10 |= {"test_batch.bin": binary(0, [0], [3])}
BINARY_10 |= {"batches.meta.txt": "\n".join([*TEN, "", ""]).encode()}
PYTHON_10 = {f"data_batch_{n}": pickled(data=pixels(n), labels=BATCHES[n]) for n in BATCHES}
PYTHON_10 |= {"test_batch": pickled(data=pixels(0), labels=[0, 3])}
PYTHON_10 |= {"batches.meta": pickled(label_names=[name.encode() for name in TEN], num_vis=3072)}
BINARY_100 = {"train.bin": binary(1, [19, 98], [3, 4]), "test.bin": binary(0, [19, 0], [3, 3])}
BINARY_100 |= {"fine_label_names.txt": "\n".join(HUNDRED).encode()}
PYTHON_100 = {"train": pickled(data=pixels(1), fine_labels=[98, 4], coarse_labels=[19, 3])}
PYTHON_100 |= {"test": pickle.dumps({"data": pixels(0), "fine_labels": [0, 3]})}  # by Python 3
PYTHON_100 |= {"meta": pickled(fine_label_names=HUNDRED, coarse_label_names=["coarse"] * 20)}
CIFAR = [BINARY_10, PYTHON_10, BINARY_100, PYTHON_100]


@pytest.mark.parametrize("files", CIFAR)
def test_cifars_images_are_read_in_order(tmp_path, write_files, files):
    """From the folder, the one that it is in, and a tar; and those of the test, by their file."""
    inner = write_files(tmp_path / "outer/inner", files)
    members = {f"inner/{name}": data for name, data in reversed(files.items())}
    (test,) = inner.glob("test*")
    title, names, batches, labels = "CIFAR-10", TEN, BATCHES, sum(BATCHES.values(), [])
    if files in (BINARY_100, PYTHON_100):
        title, names, batches, labels = "CIFAR-100", HUNDRED, [1], [98, 4]
    row, column, channel = np.indices((32, 32, 3))
    for path in (inner.parent, inner, write_files(tmp_path / "x.tar.gz", members), test):
        said = "the training images"
        if path == test:
            said, batches, labels = "the test images", [0], [0, 3]
        rows, data = np.concatenate([pixels(seed) for seed in batches]), load_dataset(path)
        expected = rows[:, 1024 * channel + 32 * row + column]
        np.testing.assert_array_equal(data.images, expected, strict=True)
        np.testing.assert_array_equal(data.labels, np.array(labels, np.int32), strict=True)
        assert data.class_names == tuple(names) and data.notes == (f"{title}: {said}",)


def test_what_is_missing_or_there_twice(tmp_path, write_files):
    """The test images may be missing; a batch may not."""
    ten = write_files(tmp_path / "ten", BINARY_10)
    (ten / "test_batch.bin").unlink()
    assert len(load_dataset(ten)) == 10
    (ten / "batches.meta.txt").rename(tmp_path / "names")
    with pytest.raises(FieldError, match="expected ten/batches.meta.txt beside "):
        load_dataset(tmp_path)
    (tmp_path / "names").rename(ten / "batches.meta.txt")
    (ten / "data_batch_3.bin").unlink()
    with pytest.raises(FieldError, match=f"expected ten/data_batch_3.bin beside .* {tmp_path}"):
        load_dataset(tmp_path)
    write_files(tmp_path / "hundred", PYTHON_100)
    with pytest.raises(FieldError, match="expected one CIFAR .* hundred/train, ten/data_batch_1"):
        load_dataset(tmp_path)


# What NumPy of Python 2 writes: an array that is filled later, and a dtype of bytes.
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY = ARRAY + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
U1, V8 = (b"cnumpy\ndtype\nU\x02" + kind + b"K\x00K\x01\x87R" for kind in (b"u1", b"V8"))


@pytest.mark.parametrize("protocol", [0, 2, 5, None])
def test_batches_are_read_whoever_wrote_them(tmp_path, write_files, protocol):
    """Every protocol of Python 3, and NumPy under Python 2, whose dtype has a state of its own."""
    state = b"(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"
    rows = b"\x89T" + struct.pack("<I", 2 * 3072) + pixels(1).tobytes()
    array = EMPTY + b"(K\x01K\x02M\x00\x0c\x86" + U1 + state + rows + b"tb"
    batch = b"\x80\x02}U\x04data" + array + b"sU\x0bfine_labels](K\x62K\x04es."
    if protocol is not None:
        batch = {"data": pixels(1), "fine_labels": [98, 4], "x": b"\xff", "": b""}
        batch = pickle.dumps(batch, protocol)
    write_files(tmp_path / "hundred", PYTHON_100 | {"train": batch})
    data = load_dataset(tmp_path / "hundred")
    expected = pixels(1).reshape(2, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(data.images, expected, strict=True)
    assert data.labels.tolist() == [98, 4]


def batch(data, labels):
    return "train", pickled(data=data, fine_labels=labels)


MNIST, IMAGES = next(iter(TRAIN.items()))
WRONG = {
    "expected images and labels in one folder": (MNIST, None),
    "expected uint8 or float32 images [image, height, ": (MNIST, idx((5,), bytes(5))),
    "expected int32 labels [4], got int32[5]": (MNIST, idx((4, 3, 2), bytes(24))),
    "number 00 00 08, got 00 00 0d": (MNIST, b"\0\0\x0d\x01" + bytes(8)),  # floats
    "cannot reshape array of size 29 into shape (5,3,2)": (MNIST, IMAGES[:-1]),
    "labels from 0 to 9, got 1 to 10": ("data_batch_2.bin", binary(1, [10], [3])),
    "labels from 0 to 1, got 1 to 8": ("batches.meta.txt", b"a\nb\n"),
    "need a bytes-like object, int found": ("batches.meta", pickled(label_names=[1] * 10)),
    "CRC check failed": (MNIST, gzip.compress(IMAGES)[:-8] + bytes(8)),
    "got uint8[2, 3072] and int64[3]": batch(pixels(1), [1, 2, 3]),
    "got uint8[2, 3072] and float64[2]": batch(pixels(1), [1.5, 2]),
    "got float64[2, 3072] and int64[2]": batch((pixels(1) / 255).tolist(), [1, 2]),
    "got uint8[3072, 2] and int64[2]": batch(pixels(1).T, [1, 2]),
    "out of bounds for int32": batch(pixels(1), [1, 2**32]),
    "an array of i1, which is refused": batch(pixels(1).astype("i1"), [1, 2]),
    "EOFError: Ran out of input": ("data_batch_1", pickled(data=pixels(1))[:-5]),
    # Crafted pickles: what would run code is refused, and what else they do ends with them.
    "asks for posix.system": ("train", b"cposix\nsystem\n(U\x09touch rantR."),
    "asks for builtins.set": ("train", pickle.dumps({1}, 2).replace(b"__builtin__", b"builtins")),
    "buffer size does not match": ("train", EMPTY + b"(K\x01K\x04\x85" + U1 + b"\x89U\x03abctb."),
    "not returning string": ("train", EMPTY + b"(K\x01K\x01\x85" + U1 + b"\x89]tb."),
    "an array of O8": ("train", pickle.dumps(np.array([None]), 2)),
    # The state of a real dtype crashes Python here.
    "an array of b'V8'": ("train", V8 + b"(K\x03U\x01|NNNK\x04K\x01K?tb."),
    "has no attribute 'items'": ("train", ARRAY + b"N}X\x0c\0\0\0__defaults__Ns\x86b."),
}


@pytest.mark.parametrize("problem", WRONG)
def test_damage_is_named_and_no_code_is_run(tmp_path, write_files, monkeypatch, problem):
    monkeypatch.chdir(tmp_path)
    name, content = WRONG[problem]
    files = next(files for files in (TRAIN, *CIFAR) if name in files) | {name: content}
    path = write_files(tmp_path / "x", {name: data for name, data in files.items() if data})
    with pytest.raises(FieldError, match=f"^data: [^\n]*{re.escape(problem)}[^\n]*$") as error:
        load_dataset(path)
    assert list(tmp_path.iterdir()) == [path]
    assert "cannot read" not in str(error.value) or name in str(error.value)
