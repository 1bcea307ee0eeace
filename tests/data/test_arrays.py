"""NumPy's files: what is in them comes back, its range is known, and what is odd is named."""

import os
import re
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Preparation, load_dataset, to_bytes, to_float
from jax_ddpm.runs import evaluate_samples, save_samples
from jax_ddpm.runs.evaluating import open_samples

pytestmark = pytest.mark.usefixtures("untyped")
BYTES = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)


def load(folder, **arrays):
    np.savez(folder / "x.npz", **arrays)
    return load_dataset(folder / "x.npz")


# An array of images and one of labels, Keras' names, others, and MedMNIST's.
PARTS = ["x y", "samples arr_0", "x_train y_train x_test y_test", "Xtrain ytrain testX testY"]
PARTS += ["train_images train_labels val_images val_labels test_images test_labels"]


@pytest.mark.parametrize("names", PARTS)
def test_bytes_stay_bytes_and_of_the_parts_of_a_file_the_training_is_read(tmp_path, names):
    labels = np.array([[1], [0], [2], [1], [0]], np.uint8)
    first, second, *others = names.split()
    rest = {name: (BYTES[:2] // 2, labels[:2])[k % 2] for k, name in enumerate(others)}
    load(tmp_path, **rest, **{first: BYTES, second: labels})
    data = load_dataset((tmp_path / "x.npz").rename(tmp_path / "X.NPZ"))
    np.testing.assert_array_equal(data.images, BYTES[..., None], strict=True)
    np.testing.assert_array_equal(to_float(data.images[..., 0]), (BYTES / 127.5 - 1).astype("f4"))
    assert data.labels.tolist() == [1, 0, 2, 1, 0] and data.class_names is None
    said = f"other parts of the data, left out: {', '.join(others)}"
    assert data.notes == ((said,) if others else ())


REFUSED = {
    r"one of labels .* got x uint8\[5, 8, 8\], y int64\[5, 5\]": {"y": np.eye(5, dtype=np.int64)},
    "5 integer labels .* int64.4.": {"y": np.zeros(4, int)},
    "labels from 0 .*, got -1": {"y": np.arange(5) - 1},
    r"of one picture: add .* got \[8, 8, 3\]": {"x": np.zeros((8, 8, 3))},
    r"of one picture: add .* got \[3, 8, 8\]": {"x": BYTES[:3]},
    "5 integer labels .* float64.5.": {"y": np.zeros(5)},
    "uint8 or float images .* got int64": {"x": BYTES.astype(int)},
    r"images .* got \[0, 8, 8\]": {"x": BYTES[:0]},
    r"1 to 4 channels, .* last .* got \[5, 3, 8, 8\]": {"x": np.zeros((5, 3, 8, 8), "u1")},
    r"or \[-1, 1\] .* got \[nan, nan\]": {"x": np.array([0, np.nan]).reshape(2, 1, 1)},
    "0 to 1 .2 class_names. .* got 1 to 5": {"y": np.arange(5) + 1, "class_names": ["a", "b"]},
    "read .* expected arr_0 to hold": {"samples": np.zeros((5, 8, 8)), "arr_0": BYTES},
    "read .* got NaN or infinity": {"samples": np.full((5, 8, 8), np.inf), "arr_0": BYTES},
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_not_understood_is_named(tmp_path, problem):
    with pytest.raises(FieldError, match=f"^data: .*{problem}"):
        load(tmp_path, **{"x": BYTES, **REFUSED[problem]})
    if "y" in REFUSED[problem]:
        data = load_dataset(tmp_path / "x.npz", Preparation(labels="none"))
        assert data.labels is None and data.images.shape == (5, 8, 8, 1)


@pytest.mark.slow
def test_a_large_file_is_not_held_in_memory(tmp_path):
    """512 MiB, of which the disk holds next to nothing: the file has holes."""
    owned = lambda: int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (2**13, 128, 128, 4))[7] = 200
    before = owned()
    data = load_dataset(tmp_path / "x.npy")
    data.digest()
    assert data.images[np.arange(0, 2**13, 128)].nbytes == 2**22
    assert owned() - before < 100 * 2**10


@pytest.mark.parametrize("order", "CF")
def test_rows_of_a_large_file_are_those_of_the_array(tmp_path, monkeypatch, order):
    monkeypatch.setattr("jax_ddpm.data.arrays._IN_MEMORY", 0)
    np.save(tmp_path / "x.npy", np.asarray(BYTES, order=order))
    data = load_dataset(tmp_path / "x.npy")
    rows = data.images
    assert isinstance(rows, np.memmap) == (order == "C")
    assert np.shares_memory(data[1:4].images, rows)  # a part of it is not copied
    for index in (np.array([[3, 3], [0, 4]]), 2, slice(1, 3), slice(None)):
        np.testing.assert_array_equal(rows[index], BYTES[..., None][index])
    os.truncate(tmp_path / "x.npy", os.path.getsize(tmp_path / "x.npy") - 63)
    with pytest.raises(FieldError, match="data: cannot read .*x.npy: mmap length is greater"):
        load_dataset(tmp_path / "x.npy")


def test_an_array_keeps_its_channels(tmp_path):
    two = np.concatenate([BYTES[..., None], 255 - BYTES[..., None]], 3)
    np.testing.assert_array_equal(load(tmp_path, x=two).images, two)


def test_a_set_is_indexed_by_image(tmp_path):
    data = load(tmp_path, x=BYTES, y=np.array([2, 0, 1, 0, 2]))
    image, label = data[-1]
    np.testing.assert_array_equal(image, BYTES[4, ..., None], strict=True)
    assert (len(data), label) == (5, 2) and [label for _, label in data] == [2, 0, 1, 0, 2]
    on_device = replace(data, images=jnp.asarray(data.images))
    for index in (slice(1, 4), np.array([1, 2, 3]), [1, 2, 3], np.arange(5) % 4 > 0):
        for some in (data[index], on_device[index]):
            assert some.labels.tolist() == [0, 1, 0] and some.digest() == data[1:4].digest()
            np.testing.assert_array_equal(some.images, BYTES[1:4, ..., None])
    assert data[:].digest() == data.digest() == on_device.digest() != some.digest()
    said = f"Dataset(5 images of 8×8×1, uint8 in 3 classes, from {tmp_path / 'x.npz'})"
    assert repr(data) == said
    wrong = {"images": BYTES}, {"images": 2 * to_float(data.images)}, {"labels": [0, 1]}
    for fields in (*wrong, {"labels": data.labels - 1}, {"class_names": ("a", "b")}):
        with pytest.raises(FieldError, match="data: expected "):
            replace(data, **fields).check()
    unlabelled = replace(data, labels=None)
    assert unlabelled[0][1] is unlabelled[:2].labels is None


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.9), (-1, 1), (-1.7, 2.1), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64, jnp.bfloat16])
def test_samples_of_ours_are_read_as_their_bytes_say(tmp_path, low, high, dtype):
    images = np.random.default_rng(0).uniform(low, high, (4, 8, 8, 3)).astype(dtype)
    save_samples(tmp_path / "x.npz", images)
    saved, data = dict(np.load(tmp_path / "x.npz")), load_dataset(tmp_path / "x.npz")
    np.testing.assert_array_equal(to_bytes(data.images), saved["arr_0"])
    samples = open_samples(tmp_path / "x.npz")
    np.testing.assert_array_equal(*samples.batches(), to_bytes(data.images))
    assert np.max(np.abs(data.images)) <= 1 and data.notes == ("pixels in [-1, 1]",)


def test_a_range_is_set_or_said(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    light = np.random.default_rng(0).uniform(0.2, 0.9, (4, 8, 8, 1))
    light[:2, 3, 3, 0] = -1e-7, 1 + 1.2e-7  # roundings
    for name, factor in (("light", 1), ("dark", -1), ("far", 3)):
        np.save(tmp_path / f"{name}.npy", factor * light)
    for given, expected in ((None, 2 * light - 1), ("unit", 2 * light - 1), ("signed", light)):
        data = load_dataset("~/light.npy", Preparation(range=given))
        np.testing.assert_allclose(data.images, expected, atol=1e-6)
        assert np.max(np.abs(data.images)) == 1
        assert data.preparation.range == (given or "unit")  # what else a run reads is read so
        assert ("none is below 0" in data.notes[0]) == (given is None)
        samples = open_samples("~/light.npy", given)
        np.testing.assert_array_equal(*samples.batches(), to_bytes(data.images))
        assert samples.recipe == {"read as": data.notes[0]}
    for name, given in (("dark", "unit"), ("far", "signed"), ("far", "unit")):
        with pytest.raises(FieldError, match=f"expected pixels in .*, as range='{given}' says in "):
            load_dataset(tmp_path / f"{name}.npy", Preparation(range=given))
    with pytest.raises(FieldError, match="samples: expected pixels in .*, as range='unit' says"):
        evaluate_samples(tmp_path / "dark.npy", load_dataset("digits"), range="unit")
    assert "no pixel is above 1 of 255" in load(tmp_path, x=BYTES % 2).notes[0]


def test_classes_of_our_files_have_names(tmp_path):
    for labels, names in (([2, 0, 2, 0, 0], ("ant", "bee", "cat")), ([[1]] * 5, (5, 7))):
        data = load(tmp_path, samples=BYTES, arr_0=BYTES, labels=labels, class_names=names)
        for found in (data, open_samples(tmp_path / "x.npz")):
            assert found.class_names == (*map(str, names),)
            assert [*found.labels] == [*np.ravel(labels)]


@pytest.mark.parametrize("labels", [[1, 2, 3, 10, 2], [0, 1, 100_000, 1, 0], [2**40, 7, 7, 7, 9]])
def test_labels_with_gaps_become_names(tmp_path, labels):
    data = load(tmp_path, x=BYTES, y=np.array(labels))
    assert data.num_classes == len(set(labels)) and data.labels.dtype == np.int32
    assert [int(data.class_names[label]) for label in data.labels] == labels
    assert "their numbers are not those in their names" in data.notes[-1]
