"""CIFAR's files, made byte by byte."""

import pickle
import re
import tarfile

import numpy as np
import pytest

from jax_ddpm.data.cifar import is_cifar, read_cifar
from jax_ddpm.data.files import open_files

TEN = [f"class{number}" for number in range(10)]
HUNDRED = [f"fine_{number}" for number in range(100)]
TRAIN = {number: [number, 9 - number] for number in range(1, 6)}
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


FILES = {
    "cifar-10-batches-bin": {
        **{f"data_batch_{n}.bin": binary(n, [a], [b]) for n, (a, b) in TRAIN.items()},
        "test_batch.bin": binary(0, [0], [3]),
        "batches.meta.txt": "\n".join([*TEN, "", ""]).encode(),
    },
    "cifar-10-batches-py": {
        **{f"data_batch_{n}": pickled(data=pixels(n), labels=TRAIN[n]) for n in TRAIN},
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


def write(path, folder, **changed):
    (path / folder).mkdir(parents=True)
    for name, data in {**FILES[folder], **changed}.items():
        if data is not None:
            (path / folder / name).write_bytes(data)
    return open_files(path)


@pytest.mark.parametrize("folder", FILES)
def test_images_are_read_in_order(tmp_path, folder):
    """From the folder, the one that it is in, and a tar; and those of the test, if asked."""
    outer = write(tmp_path, folder)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        for name in sorted(FILES[folder], key=lambda name: name[::-1]):  # in no order, as published
            archive.add(tmp_path / folder / name, f"{folder}/{name}")
    is_ten = "-10-" in folder
    training = np.concatenate([pixels(seed) for seed in (TRAIN if is_ten else [1])])
    row, column, channel = np.indices((32, 32, 3))
    for files, test in (
        (outer, False),
        (open_files(tmp_path / folder), False),
        (open_files(tmp_path / "x.tar.gz"), False),
        (outer, True),
    ):
        assert is_cifar(files.names)
        images, labels, names, note = read_cifar(files, test=test)
        expected = pixels(0) if test else training
        np.testing.assert_array_equal(images, expected[:, 1024 * channel + 32 * row + column])
        assert (images.dtype, labels.dtype) == (np.uint8, np.int32)
        classes = [1, 8, 2, 7, 3, 6, 4, 5, 5, 4] if is_ten else [98, 4]
        assert labels.tolist() == ([0, 3] if test else classes)
        assert names == tuple(TEN if is_ten else HUNDRED)
        said = "the test images" if test else "the training images; those of the test are left out"
        assert note == f"CIFAR-{10 if is_ten else 100}: {said}"


def test_what_is_missing_or_there_twice(tmp_path):
    """The names of the classes and the test images may be missing; a batch may not."""
    missing = {"batches.meta.txt": None, "test_batch.bin": None}
    _, _, names, note = read_cifar(write(tmp_path, "cifar-10-batches-bin", **missing))
    assert names is None and note == "CIFAR-10: the training images"
    (tmp_path / "cifar-10-batches-bin/data_batch_3.bin").unlink()
    with pytest.raises(ValueError, match=f"expected data_batch_3.bin beside .* {tmp_path}"):
        read_cifar(open_files(tmp_path))
    files = write(tmp_path, "cifar-100-python")
    with pytest.raises(ValueError, match="expected one CIFAR .*-bin/data_b.*-100-python/train"):
        read_cifar(files)
    for names in ([], ["train/1.png", "test/1.png", "meta/1.png"], ["train.bin"], ["a/train"]):
        assert not is_cifar(names)


DAMAGED = {
    "expected records of 3073 bytes": ("bin", "data_batch_1.bin", binary(1, [1], [8])[:-1]),
    "expected records of 3073 bytes, got 0": ("bin", "data_batch_1.bin", b""),
    "labels from 0 to 9, got 3 to 10": ("bin", "data_batch_2.bin", binary(1, [10], [3])),
    "expected 10 names, got 2": ("bin", "batches.meta.txt", b"a\nb\n"),
    "the names of the classes": ("py", "batches.meta", pickled(label_names=[1] * 10)),
    "data of uint8, got nothing": ("py", "data_batch_1", pickled(labels=[1, 2])),
    "got uint8[2, 3071]": ("py", "data_batch_1", pickled(data=pixels(1)[:, 1:], labels=[1, 2])),
    "got uint8[0, 3072]": ("py", "data_batch_1", pickled(data=pixels(1)[:0], labels=[])),
    "whole numbers, got a list": ("py", "data_batch_1", pickled(data=pixels(1), labels=[1, b"2"])),
    "2 labels, got 3": ("py", "data_batch_1", pickled(data=pixels(1), labels=[1, 2, 3])),
    "from 0 to 9, got -1 to 1": ("py", "data_batch_1", pickled(data=pixels(1), labels=[1, -1])),
    "expected a dict, got a list": ("py", "data_batch_1", pickle.dumps([1], 2)),
    "expected a dict, got a dict": ("py", "data_batch_1", pickle.dumps({1: 2}, 2)),
    "which is refused": ("py", "data_batch_1", b"cposix\nsystem\nU\x01x\x85R."),
    "cannot read the pickle": ("py", "data_batch_1", pickled(data=pixels(1))[:-5]),
}


@pytest.mark.parametrize("problem", DAMAGED)
def test_damage_is_named(tmp_path, problem):
    kind, name, data = DAMAGED[problem]
    files = write(tmp_path, f"cifar-10-batches-{kind}", **{name: data})
    with pytest.raises(ValueError, match=f"-{kind}/{name}.*: .*{re.escape(problem)}") as caught:
        read_cifar(files)
    assert "\n" not in str(caught.value)
