"""The files that MNIST and CIFAR were published in, written here byte by byte.

Their images and labels come back; damage is named; unpickling runs no code.
"""

import gzip
import pickle
import re
import struct

import numpy as np
import pytest

from jax_ddpm._errors import FieldError
from jax_ddpm.data import load_dataset
from jax_ddpm.data.unpickling import safe_loads

pytestmark = pytest.mark.usefixtures("untyped")


def idx(shape, data):
    return struct.pack(f">BBBB{len(shape)}I", 0, 0, 8, len(shape), *shape) + data


IMAGES, LABELS = idx((5, 3, 2), bytes(range(30))), idx((5,), bytes([7, 0, 9, 9, 1]))
TRAIN = {"train-images-idx3-ubyte": IMAGES, "train-labels-idx1-ubyte": LABELS}
TEST = {
    "t10k-images-idx3-ubyte": idx((1, 3, 2), bytes(6)),
    "t10k-labels-idx1-ubyte": idx((1,), b"\x03"),
}


def check_mnist(path, note="the training images"):
    data = load_dataset(path)
    pixels = np.arange(30, dtype=np.uint8).reshape(5, 3, 2, 1)
    np.testing.assert_array_equal(data.images, pixels, strict=True)
    np.testing.assert_array_equal(data.labels, np.array([7, 0, 9, 9, 1], np.int32), strict=True)
    assert data.notes == (note,)


@pytest.mark.parametrize("place", ["folder", "x.tar.gz"])
def test_mnists_training_images_are_read(tmp_path, write_files, place):
    packed = {f"FashionMNIST/raw/{name}.gz": gzip.compress(data) for name, data in TRAIN.items()}
    for folder, files in (("plain", TRAIN), ("packed", packed)):
        (tmp_path / folder).mkdir()
        check_mnist(write_files(tmp_path / folder / place, files))


def test_the_test_images_are_read_by_their_file_or_alone(tmp_path, write_files):
    for path in (write_files(tmp_path, TEST), tmp_path / "t10k-labels-idx1-ubyte"):
        data = load_dataset(path)
        assert data.images.shape == (1, 3, 2, 1) and data.labels.tolist() == [3]
        assert data.notes == ("the images of the test: those for training are not there",)
    check_mnist(write_files(tmp_path, TRAIN), "the training images; those of the test are left out")
    assert load_dataset(tmp_path / "t10k-images-idx3-ubyte").labels.tolist() == [3]


def test_copies_are_no_second_data_set(tmp_path, write_files):
    """Packed beside unpacked; and a widely used archive has each file also in its own folder."""
    dotted = {name.replace("-idx", ".idx"): data for name, data in TRAIN.items()}
    packed = {f"{name}.gz": gzip.compress(data) for name, data in dotted.items()}
    folders = {f"{name}/{name}": data for name, data in TRAIN.items()}
    check_mnist(write_files(tmp_path, dotted | packed | folders))
    write_files(tmp_path / "again", TRAIN)
    with pytest.raises(FieldError, match="one data set .* got again/train-images.*, train-images"):
        load_dataset(tmp_path)


PACKED = gzip.compress(IMAGES)
WRONG_MNIST = [
    (None, "expected images and labels in one folder"),
    (LABELS, "numbers of [image, height, width], got [5]"),
    (idx((0, 3, 2), b""), "got [0, 3, 2]"),
    (idx((4, 3, 2), bytes(24)), "expected 4 labels"),
    (b"\0\0\x0d\x01" + bytes(8), "expected the magic number 00 00 08, got 00 00 0d"),  # floats
    (IMAGES[:14], "folder: buffer is smaller"),
    (IMAGES[:-1], "cannot reshape array of size 29 into shape (5,3,2)"),
    (PACKED[:-9], "cannot read train-images"),
    (PACKED[:-8] + bytes(8), "cannot read train-images"),
]


@pytest.mark.parametrize(("content", "problem"), WRONG_MNIST)
def test_damage_of_mnist_is_named(tmp_path, write_files, content, problem):
    files = TRAIN | {"train-images-idx3-ubyte": content} if content else dict([*TRAIN.items()][:1])
    with pytest.raises(FieldError, match=f"^data: [^\n]*{re.escape(problem)}[^\n]*$"):
        load_dataset(write_files(tmp_path / "folder", files))


TEN = [f"class{number}" for number in range(10)]
HUNDRED = [f"fine_{number}" for number in range(100)]
BATCHES = {number: [number, 9 - number] for number in range(1, 6)}
"""The labels of CIFAR-10's training batches, by their numbers."""


def pixels(seed):
    """Of two images: red, then green, then blue, each row by row."""
    return np.random.default_rng(seed).integers(0, 256, (2, 3072), np.uint8)


def binary(seed, *labels):
    rows = pixels(seed)
    return b"".join(bytes(each) + row.tobytes() for each, row in zip(labels, rows, strict=True))


def pickled(**values):
    """As Python 2 wrote them, whose text is bytes."""
    return pickle.dumps({key.encode(): value for key, value in values.items()}, 2)


CIFAR = {
    "cifar-10-batches-bin": {
        **{f"data_batch_{n}.bin": binary(n, [a], [b]) for n, (a, b) in BATCHES.items()},
        "test_batch.bin": binary(0, [0], [3]),
        "batches.meta.txt": "\n".join([*TEN, "", ""]).encode(),
    },
    "cifar-10-batches-py": {
        **{f"data_batch_{n}": pickled(data=pixels(n), labels=BATCHES[n]) for n in BATCHES},
        "test_batch": pickled(data=pixels(0), labels=[0, 3]),
        "batches.meta": pickled(label_names=[name.encode() for name in TEN], num_vis=3072),
    },
    "cifar-100-binary": {
        "train.bin": binary(1, [19, 98], [3, 4]),
        "test.bin": binary(0, [19, 0], [3, 3]),
        "fine_label_names.txt": "\n".join(HUNDRED).encode(),
        "coarse_label_names.txt": b"coarse\n" * 20,
    },
    "cifar-100-python": {
        "train": pickled(data=pixels(1), fine_labels=[98, 4], coarse_labels=[19, 3]),
        "test": pickle.dumps({"data": pixels(0), "fine_labels": [0, 3]}),  # by Python 3
        "meta": pickled(fine_label_names=HUNDRED, coarse_label_names=["coarse"] * 20),
    },
}


@pytest.mark.parametrize("folder", CIFAR)
def test_cifars_images_are_read_in_order(tmp_path, write_files, folder):
    """From the folder, the one that it is in, and a tar; and those of the test, by their file."""
    inner = write_files(tmp_path / "outer" / folder, CIFAR[folder])
    in_no_order = sorted(CIFAR[folder].items(), key=lambda file: file[0][::-1])  # as published
    members = {f"{folder}/{name}": data for name, data in in_no_order}
    (test,) = inner.glob("test*")
    title, names, batches, labels = "CIFAR-100", HUNDRED, [1], [98, 4]
    if "-10-" in folder:
        title, names, batches, labels = "CIFAR-10", TEN, BATCHES, sum(BATCHES.values(), [])
    row, column, channel = np.indices((32, 32, 3))
    for path in (inner.parent, inner, write_files(tmp_path / "x.tar.gz", members), test):
        said = "the training images; those of the test are left out"
        if path == test:
            said, batches, labels = "the test images", [0], [0, 3]
        rows, data = np.concatenate([pixels(seed) for seed in batches]), load_dataset(path)
        expected = rows[:, 1024 * channel + 32 * row + column]
        np.testing.assert_array_equal(data.images, expected, strict=True)
        np.testing.assert_array_equal(data.labels, np.array(labels, np.int32), strict=True)
        assert data.class_names == tuple(names) and data.notes == (f"{title}: {said}",)


def test_what_is_missing_or_there_twice(tmp_path, write_files):
    """The names of the classes and the test images may be missing; a batch may not."""
    files = CIFAR["cifar-10-batches-bin"].copy()
    del files["batches.meta.txt"], files["test_batch.bin"]
    data = load_dataset(write_files(tmp_path / "ten", files))
    assert data.class_names is None and data.notes == ("CIFAR-10: the training images",)
    (tmp_path / "ten/data_batch_3.bin").unlink()
    with pytest.raises(FieldError, match=f"expected data_batch_3.bin beside .* {tmp_path}"):
        load_dataset(tmp_path)
    write_files(tmp_path / "hundred", CIFAR["cifar-100-python"])
    with pytest.raises(FieldError, match="expected one CIFAR .* hundred/train, ten/data_batch_1"):
        load_dataset(tmp_path)


WRONG_CIFAR = {
    "expected records of 3073 bytes": ("data_batch_1.bin", binary(1, [1], [8])[:-1]),
    "labels from 0 to 9, got 3 to 10": ("data_batch_2.bin", binary(1, [10], [3])),
    "10 classes as text, got a list of 2": ("batches.meta.txt", b"a\nb\n"),
    "10 classes as text, got a list of 10": ("batches.meta", pickled(label_names=[1] * 10)),
    "got uint8[2, 3071]": ("data_batch_1", pickled(data=pixels(1)[:, 1:], labels=[1, 2])),
    "got uint8[0, 3072]": ("data_batch_1", pickled(data=pixels(1)[:0], labels=[])),
    "numbers, got a list of 2": ("data_batch_1", pickled(data=pixels(1), labels=[1, b"2"])),
    "numbers, got a list of 3": ("data_batch_1", pickled(data=pixels(1), labels=[1, 2, 3])),
    "from 0 to 9, got -1 to 1": ("data_batch_1", pickled(data=pixels(1), labels=[1, -1])),
    "expected a dict, got a list": ("data_batch_1", pickle.dumps([1], 2)),
    "cannot read the pickle": ("data_batch_1", pickled(data=pixels(1))[:-5]),
}


@pytest.mark.parametrize("problem", WRONG_CIFAR)
def test_damage_of_cifar_is_named(tmp_path, write_files, problem):
    name, content = WRONG_CIFAR[problem]
    files = next(files for files in CIFAR.values() if name in files)
    path = write_files(tmp_path / "folder", files | {name: content})
    with pytest.raises(FieldError, match=f"^data: {name}[^\n]*{re.escape(problem)}[^\n]*$"):
        load_dataset(path)


PLAIN = {
    b"data": ([1, 2.5, -3, 2**70, True, None], ("é", b"\xff\x00", "", b"")),
    "nested": {"a": [[], {}, ()], 3: bytes(300)},
}


@pytest.mark.parametrize("protocol", range(6))
def test_plain_data_arrays_and_numbers_come_back(protocol):
    assert safe_loads(pickle.dumps(PLAIN, protocol)) == PLAIN
    array = np.arange(24).reshape(2, 3, 4)
    values = [array.astype(code) for code in ("u1", ">i8", "<f2", "f8", "c16", "?")]
    values += [np.asfortranarray(array), array[..., :1], np.zeros((0, 3)), np.array(5)]
    values += [np.float32(1.5), np.int64(-7), np.bool_(True)]
    loaded = safe_loads(pickle.dumps([*values, values[0]], protocol))
    for got, expected in zip(loaded[:-1], values, strict=True):
        assert type(got) is type(expected) and got.dtype == expected.dtype
        np.testing.assert_array_equal(got, expected)
    assert loaded[-1] is loaded[0] and loaded[0].flags.writeable
    whole = pickle.dumps({"a": array, "b": ["x", (1.5, b"y")]}, protocol)
    for end in range(len(whole)):
        with pytest.raises(ValueError, match=r"^cannot read the pickle: [^\n]+$"):
            safe_loads(whole[:end])


# What NumPy of Python 2 writes: an empty array, a dtype, and a state with both and three bytes.
ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n"
EMPTY = ARRAY + b"cnumpy\nndarray\nK\x00\x85U\x01b\x87R"
DTYPE = b"cnumpy\ndtype\n"
U1 = DTYPE + b"U\x02u1K\x00K\x01\x87R"
STATE = b"(K\x01%b%b\x89U\x03abctb."


@pytest.mark.parametrize(("order", "kind"), [(b"|", b"u1"), (b">", b"f8")])
def test_arrays_of_python_2(order, kind):
    """Byte strings, and numbers for truths."""
    array = np.arange(5).astype((order + kind).decode())
    full = DTYPE + b"U\x02%bK\x00K\x01\x87R(K\x03U\x01%bNNN" % (kind, order)
    full += b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data = b"\x89T" + struct.pack("<I", array.nbytes) + array.tobytes()
    loaded = safe_loads(b"\x80\x02}U\x04data" + EMPTY + b"(K\x01K\x05\x85" + full + data + b"tbs.")
    np.testing.assert_array_equal(loaded[b"data"], array, strict=True)


CRAFTED = {
    "asks for posix.system": b"cposix\nsystem\n(U\x09touch rantR.",
    "holds a set": pickle.dumps({1}),
    "holds a Array": EMPTY + b".",  # without a state
    "an array of dtype O8": pickle.dumps(np.array([None]), 2),
    "a structured dtype": U1 + b"(K\x03U\x01|NU\x01a}J\xff\xff\xff\xffK\x01K\x01tb.",
    "an array of another class": ARRAY + DTYPE + b"K\x00\x85U\x01b\x87R.",
    "makes an array by itself": b"cnumpy\nndarray\nK\x03\x85\x85R.",
    "without a dtype": EMPTY + STATE % (b"K\x03\x85", b"N"),
    "an array of 3 bytes, expected 4": EMPTY + STATE % (b"K\x04\x85", U1),
    r"of shape \(-1, -3\)": EMPTY + STATE % (b"J\xff\xff\xff\xffJ\xfd\xff\xff\xff\x86", U1),
    "changes a function": ARRAY + b"}U\x09_functionU\x01xsb.",
    "a key that is a _DType": b"}" + U1 + b"K\x01s.",
}


@pytest.mark.parametrize("problem", CRAFTED)
def test_what_would_run_or_is_no_plain_data_is_refused(tmp_path, monkeypatch, problem):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"^cannot read the pickle: [^\n]*{problem}"):
        safe_loads(CRAFTED[problem])
    assert not list(tmp_path.iterdir())
