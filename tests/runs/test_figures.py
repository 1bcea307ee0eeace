"""Pictures: their pixels, their titles, and the files that samples are written to."""

from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.data import load_dataset, to_bytes
from jax_ddpm.runs.figures import image_grid
from jax_ddpm.runs.settings import named_schedule

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

RNG = np.random.default_rng(0)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


def floats(count, size, channels):
    return RNG.uniform(-1.1, 1.1, (count, size, size, channels)).astype(np.float32)


def test_to_bytes():
    x = np.array([-2, -1, -0.5, 0, 1, 2], np.float32).reshape(1, 1, 6, 1)
    np.testing.assert_array_equal(to_bytes(x).ravel(), [0, 0, 64, 128, 255, 255])
    pixels = RNG.integers(0, 256, (2, 4, 4, 3), np.uint8)
    assert to_bytes(pixels) is pixels
    np.testing.assert_array_equal(to_bytes(pixels.astype(np.float32) / 127.5 - 1), pixels)


@pytest.mark.parametrize("channels", MODES)
def test_pixels_are_those_of_pillow(channels, tmp_path):
    """In a grid on white, and in files of their own; with opacity or without."""
    pixels = RNG.integers(0, 256, (1, 640, 640, channels), np.uint8)
    runs.save_samples(tmp_path / "new/samples", pixels)
    assert [file.name for file in (tmp_path / "new").rglob("*.*")] == ["00000.png"]
    picture = Image.open(tmp_path / "new/samples/00000.png")
    assert picture.mode == MODES[channels]
    np.testing.assert_array_equal(np.asarray(picture).reshape(pixels[0].shape), pixels[0])
    white = Image.new("RGB", picture.size, "white")
    white.paste(picture.convert("RGB"), mask=picture.getchannel("A") if channels % 2 == 0 else None)
    grid = image_grid(pixels)
    assert grid.shape == (644, 644, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[2:-2, 2:-2], np.asarray(white))
    assert np.all(grid[:2] == 255) and np.all(grid[:, -2:] == 255)


@pytest.mark.parametrize(("size", "columns"), [(8, 10), (64, 2)])
def test_titles_stand_above_their_columns(size, columns):
    """And change nothing below."""
    images = floats(columns + 1, size, 1)
    plain = image_grid(images, columns)
    titles = ["Gänse", "a long name of several words", *map(str, range(13))][:columns]
    titled = image_grid(images, columns, titles)
    extra = len(titled) - len(plain)
    np.testing.assert_array_equal(titled[extra:], plain)
    cell = (plain.shape[1] - 2) // columns
    for column in range(columns):
        part = titled[:extra, column * cell : (column + 1) * cell]
        inked = np.flatnonzero(np.any(part < 128, (0, 2)))
        assert abs((inked[0] + inked[-1]) / 2 - cell / 2) < max(8, cell / 10), "centred"
    with pytest.raises(runs.FieldError, match=f"titles: expected {columns}, one for each column"):
        image_grid(images, columns, ["a"])


@pytest.mark.parametrize("count", [1, 12, 60])
def test_a_loss_is_drawn_without_a_warning(tmp_path, count):
    """A point, a line, and a line below its median: blue on white."""
    runs.save_loss(tmp_path / "x.png", range(count), np.geomspace(1, 0.1, count))
    red, green, blue = (
        np.asarray(Image.open(tmp_path / "x.png").convert("RGB"), int).reshape(-1, 3).T
    )
    assert np.sum(blue > red + 50) > 20


def test_files_of_grids_and_of_numbers(tmp_path):
    frames, labels = [floats(4, 8, 1).clip(-1, 1) for _ in range(3)], np.arange(4, dtype=np.int32)
    runs.save_samples(tmp_path / "x.png", frames[0], columns=2, titles=["a", "b"])
    expected = image_grid(frames[0], titles=["a", "b"])  # as many columns as titles
    np.testing.assert_array_equal(Image.open(tmp_path / "x.png"), expected)
    runs.save_gif(tmp_path / "x.gif", frames, titles=["a", "b"])
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 3 and gif.size == expected.shape[1::-1]
        gif.seek(2)
        assert gif.info["duration"] == 60 * 25, "the last one is held"
    runs.save_samples(tmp_path / "x.npz", frames[0], labels)
    arrays = dict(np.load(tmp_path / "x.npz"))
    assert arrays.keys() == {"samples", "labels", "arr_0"} and arrays["samples"].dtype == np.float32
    np.testing.assert_array_equal(arrays["arr_0"], to_bytes(frames[0]))
    data = load_dataset(str(tmp_path / "x.npz"))
    np.testing.assert_array_equal(data.images, frames[0])
    np.testing.assert_array_equal(data.labels, labels)


def test_names_of_pictures(tmp_path):
    images, labels = floats(3, 8, 1), np.array([2, 0, 1])
    for names, expected in ((None, "2 0 1"), (["../cat, big", "Gänse", "?"], "2 cat-big Gänse")):
        runs.save_samples(tmp_path / expected, images, labels, names=names)
        found = sorted(file.stem for file in (tmp_path / expected).iterdir())
        assert found == [f"0000{k}-{name}" for k, name in enumerate(expected.split())]


def test_no_folder_is_overwritten_and_none_is_half_written(tmp_path, monkeypatch):
    images = floats(2, 8, 1)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/x").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    holed = np.where(images == images[1, 2, 3], np.float32(np.inf), images)
    for make in (
        lambda: runs.save_gif("x.gif", [images, holed * np.float32(np.nan)]),
        lambda: runs.save_forward("x.png", named_schedule("cosine", 4), holed[1]),
        lambda: to_bytes(np.float16([[-np.inf]])),
    ):
        with pytest.raises(runs.FieldError, match="^images: expected finite pixels, got NaN"):
            make()
    monkeypatch.setattr("jax_ddpm.runs.figures.write_file", Mock(side_effect=OSError(28, "full")))
    with pytest.raises(OSError, match="full: 'new'"):
        runs.save_samples("new", images)
    for field, wrong in (
        *(("path", {"path": path}) for path in ("full", "file", ".", "x.jpg")),
        ("labels", {"labels": np.arange(3)}),
        ("names", {"labels": np.arange(2), "names": ["one"]}),
        ("images", {"images": floats(2, 8, 5)}),
        ("images", {"images": images[:0], "path": "x.png"}),
        *(("images", {"images": holed, "path": path}) for path in ("x.png", "x.npz", "new")),
        ("images", {"images": images.astype(np.int32)}),
    ):
        with pytest.raises(runs.FieldError, match=f"^{field}: expected "):
            runs.save_samples(**{"path": "new", "images": images, **wrong})
    assert sorted(tmp_path.rglob("*")) == before
