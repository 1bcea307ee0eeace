"""NumPy's files: what pixels and labels mean, what is refused, and rows that stay in the file."""

import os
import tracemalloc

import numpy as np
import pytest

from jax_ddpm._checks import FieldError
from jax_ddpm.data import load_dataset, to_float
from jax_ddpm.data.rows import FileRows

pytestmark = pytest.mark.usefixtures("untyped")
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 8, 8), np.uint8)


def load(folder, **arrays):
    np.savez(folder / "x.npz", **arrays)
    return load_dataset(folder / "x.npz")


def test_labels_in_a_column_are_labels(tmp_path):
    labels = np.array([3, 1, 4, 1, 0])
    for column in (labels, labels[:, None]):
        np.testing.assert_array_equal(load(tmp_path, x=IMAGES, y=column).labels, labels)


REFUSED = {
    r"one of labels .* got x uint8\[5, 8, 8\], y int64\[5, 5\]": {"y": np.eye(5, dtype=np.int64)},
    r"got x uint8\[5, 8, 8\], scale float32\[\]": {"scale": np.float32(3)},
    "expected a label for each of 5 images": {"y": np.zeros(4, int)},
    "expected labels from 0 .*, got -1": {"y": np.arange(5) - 1},
    "expected integer labels": {"y": np.zeros(5)},
    "expected labels of 32 bits .*, got 4294967296": {"y": np.arange(5) + 2**32},
    r"expected images of shape .*, got \(0, 8, 8, 1\)": {"x": IMAGES[:0]},
    r"channels last, 1 to 4 of them, got \(5, 3, 8, 8\)": {"x": np.zeros((5, 3, 8, 8), "u1")},
    "expected uint8 or float images, got int64": {"x": IMAGES.astype(int)},
    "expected finite pixels, .* first of them image 1": {"x": np.array([[[0.0]], [[np.nan]]])},
    r"got \[0, 1\.00001\]": {"x": np.array([[[0.0, 1.00001]]])},  # beyond a rounding
}


@pytest.mark.parametrize("problem", REFUSED)
def test_what_is_not_understood_is_named(tmp_path, problem):
    with pytest.raises(FieldError, match=f"^data: .*{problem}"):
        load(tmp_path, **{"x": IMAGES, **REFUSED[problem]})


@pytest.mark.parametrize("off", [-1e-7, 1 + 1.2e-7])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_rounding_does_not_change_what_pixels_mean(tmp_path, off, dtype):
    pixels = np.linspace(0, 1, 128, dtype=dtype).reshape(2, 8, 8)
    pixels[0, 3, 3] = off
    data = load(tmp_path, x=pixels)
    expected = (2 * np.clip(pixels, 0, 1) - 1)[..., None]
    np.testing.assert_allclose(data.images, expected, atol=1e-6)
    assert np.max(np.abs(data.images)) == 1
    assert data.notes == ("pixels in [0, 1]",)


def test_masks_of_ones_are_said_to_be_dark(tmp_path):
    (note,) = load(tmp_path, x=IMAGES % 2).notes
    assert "no pixel is above 1 of 255" in note


def test_bytes_stay_bytes(tmp_path):
    """Neither float64 on the way, nor float32 before the device."""
    pixels = np.random.default_rng(0).integers(0, 256, (500, 64, 64), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    tracemalloc.start()
    images = load_dataset(tmp_path / "x.npy").images
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * pixels.nbytes
    np.testing.assert_array_equal(images[..., 0], pixels)
    floats = (pixels[:9] / 127.5 - 1).astype("f4")
    np.testing.assert_array_equal(to_float(images[:9, ..., 0]), floats)


@pytest.mark.parametrize("order", "CF")
def test_rows_of_a_large_file_are_those_of_the_array(tmp_path, monkeypatch, order):
    monkeypatch.setattr("jax_ddpm.data.arrays._IN_MEMORY", 0)
    np.save(tmp_path / "x.npy", np.asarray(IMAGES, order=order))
    rows = load_dataset(tmp_path / "x.npy").images
    assert isinstance(rows, FileRows) == (order == "C")
    for index in (np.array([[3, 3], [0, 4]]), 2, slice(1, 3), slice(None)):
        np.testing.assert_array_equal(rows[index], IMAGES[..., None][index])
    assert (rows.shape, rows.dtype, len(rows)) == ((5, 8, 8, 1), np.uint8, 5)
    assert rows[0].flags.writeable


def test_rows_of_a_file_that_was_cut_short(tmp_path):
    IMAGES.tofile(tmp_path / "x.bin")
    rows = FileRows(tmp_path / "x.bin", IMAGES.shape)
    os.truncate(tmp_path / "x.bin", 4 * 64 + 1)
    np.testing.assert_array_equal(rows[3], IMAGES[3])
    with pytest.raises(OSError, match=r"was cut short while it was read.*x.bin"):
        rows[4]
    with pytest.raises(IndexError):
        rows[5]
