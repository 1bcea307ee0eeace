"""Pictures: their pixels, their titles, and the files that samples are written to."""

import io

import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.data import load_dataset, to_bytes
from jax_ddpm.runs.figures import image_grid

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

RNG = np.random.default_rng(0)


def floats(count, size, channels):
    return RNG.uniform(-1.1, 1.1, (count, size, size, channels)).astype(np.float32)


def integers(count, size, channels):
    return RNG.integers(0, 256, (count, size, size, channels), np.uint8)


def test_to_bytes():
    x = np.array([-2, -1, -0.5, 0, 1, 2], np.float32).reshape(1, 1, 6, 1)
    np.testing.assert_array_equal(to_bytes(x).ravel(), [0, 0, 64, 128, 255, 255])
    pixels = integers(2, 4, 3)
    assert to_bytes(pixels) is pixels
    np.testing.assert_array_equal(to_bytes(pixels.astype(np.float32) / 127.5 - 1), pixels)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_pixels_are_those_of_pillow(channels):
    """On white; grey or RGB, with opacity or without."""
    pixels = integers(1, 640, channels)
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
    picture = Image.fromarray(pixels[0].squeeze())
    assert picture.mode == mode
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture.convert("RGB"), mask=picture.getchannel("A") if "A" in mode else None)
    grid = image_grid(pixels)
    assert grid.shape == (644, 644, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[2:-2, 2:-2], np.asarray(white))
    assert np.all(grid[:2] == 255) and np.all(grid[:, -2:] == 255)
    np.testing.assert_array_equal(image_grid(pixels.astype(np.float32) / 127.5 - 1), grid)


@pytest.mark.parametrize("size", [8, 28, 64])
@pytest.mark.parametrize("columns", [2, 10, 16])
def test_titles_change_the_top_alone(size, columns):
    images = floats(columns + 1, size, 1)
    plain = image_grid(images, columns)
    titles = ["ship", "Gänse", "a long name of several words", *map(str, range(13))][:columns]
    titled = image_grid(images, columns, titles)
    extra = len(titled) - len(plain)
    np.testing.assert_array_equal(titled[extra:], plain)
    assert 10 < extra < 50
    cell = (plain.shape[1] - 2) // columns
    top = titled[:extra]
    assert np.all(top[:2] == 255)
    for column in range(columns):
        inked = np.flatnonzero(np.any(top[:, column * cell : (column + 1) * cell] < 128, (0, 2)))
        assert inked.size
        middle = (inked[0] + inked[-1]) / 2
        assert abs(middle - cell / 2) < max(8, cell / 10), "centred"


def test_titles_that_do_not_fit():
    images = floats(4, 28, 1)
    assert image_grid(images, titles=["a", "b"]).shape[1] == image_grid(images, 2).shape[1]
    image_grid(images[:1], 2, ["a", "b"])  # as many as were asked for, of which one is there
    image_grid(images, 2, ["", "two\nlines"])
    np.testing.assert_array_equal(
        image_grid(images, 2, np.arange(2)), image_grid(images, 2, ["0", "1"])
    )
    for titles in (["a"], ["a", "b", "c"], ()):
        with pytest.raises(runs.FieldError, match="titles: expected 2, one for each column, got"):
            image_grid(images, 2, titles)
    with pytest.raises(runs.FieldError, match="titles: expected a list or None, got 'ab'"):
        runs.save_grid(io.BytesIO(), images, 2, "ab")
    with pytest.raises(runs.FieldError, match="images: expected at least one"):
        image_grid(images[:0])
    with pytest.raises(runs.FieldError, match="or a uint8 array .batch"):
        runs.save_grid(io.BytesIO(), images.astype(np.int32))


def test_files_of_grids(tmp_path):
    frames = [floats(4, 8, 1) for _ in range(3)]
    runs.save_grid(tmp_path / "x.png", frames[0], titles=["a", "b"])
    runs.save_samples(tmp_path / "y.png", frames[0], columns=2, titles=["a", "b"])
    expected = image_grid(frames[0], 2, ["a", "b"])
    for name in ("x.png", "y.png"):
        np.testing.assert_array_equal(Image.open(tmp_path / name), expected)
    runs.save_gif(tmp_path / "x.gif", frames, titles=["a", "b"])
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3 and gif.size == expected.shape[1::-1]


def test_numbers_and_back(tmp_path):
    images, labels = floats(5, 8, 3).clip(-1, 1), np.arange(5, dtype=np.int32)
    runs.save_samples(tmp_path / "x.npz", images, labels)
    arrays = dict(np.load(tmp_path / "x.npz"))
    assert arrays.keys() == {"samples", "labels", "arr_0"}
    np.testing.assert_array_equal(arrays["samples"], images)
    np.testing.assert_array_equal(arrays["arr_0"], to_bytes(images))
    assert arrays["samples"].dtype == np.float32 and arrays["arr_0"].dtype == np.uint8
    data = load_dataset(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(data.images, images)
    np.testing.assert_array_equal(data.labels, labels)
    runs.save_samples(tmp_path / "y.npz", images)
    assert np.load(tmp_path / "y.npz").files == ["samples", "arr_0"]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_folder_of_pictures(tmp_path, channels):
    images = floats(3, 8, channels)
    folder = tmp_path / "new/samples"
    runs.save_samples(folder, images)
    assert sorted(file.name for file in folder.iterdir()) == [f"0000{k}.png" for k in range(3)]
    assert [each.name for each in folder.parent.iterdir()] == ["samples"]
    for k in range(3):
        picture = Image.open(folder / f"0000{k}.png")
        assert picture.mode == {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[channels]
        expected = to_bytes(images)[k]
        np.testing.assert_array_equal(np.asarray(picture).reshape(expected.shape), expected)


def test_names_of_pictures(tmp_path):
    images, labels = floats(3, 8, 1), np.array([2, 0, 1])
    runs.save_samples(tmp_path / "numbers", images, labels)
    runs.save_samples(tmp_path / "names", images, labels, names=["../cat, big", "Gänse", "?"])
    for folder, names in (
        ("numbers", ["00000-2", "00001-0", "00002-1"]),
        ("names", ["00000-2", "00001-cat-big", "00002-Gänse"]),
    ):
        found = sorted(file.name for file in (tmp_path / folder).iterdir())
        assert found == [f"{name}.png" for name in names]


def test_no_folder_is_overwritten(tmp_path, monkeypatch):
    images = floats(2, 8, 1)
    (tmp_path / "empty").mkdir()
    runs.save_samples(tmp_path / "empty", images)
    before = {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()}
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    for path, problem in (
        ("empty", "expected a new or empty folder, got empty"),
        ("file", "expected a new or empty folder, got file"),
        (".", "expected a .png, a .npz or a new folder, got ."),
        ("x.jpg", "expected a .png, a .npz or a new folder, got x.jpg"),
    ):
        with pytest.raises(runs.FieldError, match=f"^path: {problem}$"):
            runs.save_samples(path, images)
    assert {file: file.read_bytes() for file in (tmp_path / "empty").iterdir()} == before
    for field, wrong in (
        ("labels", {"labels": np.arange(3)}),
        ("names", {"labels": np.arange(2), "names": ["one"]}),
        ("images", {"images": floats(2, 8, 5)}),
    ):
        with pytest.raises(runs.FieldError, match=f"^{field}: expected "):
            runs.save_samples(**{"path": "new", "images": images, **wrong})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jax_ddpm.runs.figures.write_file", full)
    with pytest.raises(OSError, match="No space left on device: 'new'"):
        runs.save_samples("new", images)
    assert {path.name for path in tmp_path.iterdir()} == {"empty", "file"}
