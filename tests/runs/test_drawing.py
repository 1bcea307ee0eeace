"""Samples: drawn from a run, and the pictures and the files that are made of them."""

import equinox as eqx
import jax
import numpy as np
import pytest
from PIL import Image

import jax_ddpm as ddpm
from jax_ddpm import runs
from jax_ddpm.data import to_bytes
from jax_ddpm.runs.drawing import labels_in_turn, warn_of_labels
from jax_ddpm.runs.figures import class_columns, image_grid

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

RNG = np.random.default_rng(0)
IMAGES = RNG.uniform(-1.1, 1.1, (4, 8, 8, 1)).astype(np.float32)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}


@pytest.fixture(scope="module")
def digits(untrained):
    run = runs.load_run(untrained / "runs/digits")
    return run._replace(prediction_type="v_prediction")  # or all pixels are ±1


def test_a_sample_is_its_own_however_many_are_drawn(digits):
    """In one batch or in several, the last of them not full."""
    options, seen = {"labels": [3, 4, 5], "steps": 2, "sampler": ddpm.ddim(eta=1.0)}, []
    whole = runs.draw(jax.random.key(3), digits, 6, watch=seen.append, **options)
    parts = runs.draw(jax.random.key(3), digits, 5, batch_size=2, **options)
    np.testing.assert_allclose(parts, whole[:5], atol=1e-4)
    assert np.abs(whole[:3] - whole[3:]).mean() > 0.1, "each another"
    np.testing.assert_array_equal(seen[-1], whole)
    assert len(seen) == 3, "noise, and the states after each piece of the chain"


@pytest.mark.parametrize(
    ("names", "label", "number", "said"),
    [
        (("cafe\u0301", "tea"), "caf\u00e9", 0, ""),
        (("00", "01", "02"), "2", 2, ""),
        (("0", "1", "10", "2"), "2", 3, "label 3 is the class named '2'"),
        (("0", "1", "10", "2"), 2, 2, "label 2 is the class named '10'"),
        (("ant", "bee"), np.array(["1", "ant"]), 1, ""),
        (("1", "01"), "1", 0, "label 0 is the class named '1'"),
    ],
)
def test_a_class_goes_by_its_name(digits, recwarn, names, label, number, said):
    """In any form of Unicode; where names are numbers that are not the labels, it is said."""
    run = digits._replace(num_classes=len(names), class_names=names)
    labels = labels_in_turn(run, 1, label)
    warn_of_labels(run, labels)
    assert labels.tolist() == [number]
    assert [str(each.message) for each in recwarn] == [f"labels: {said}"] * bool(said)


def test_classes_have_columns_and_what_does_not_suit_a_run_is_named(digits):
    # A grid has one class in each column, several times all of them where they are few.
    for classes, columns in ((2, 8), (3, 6), (10, 10), (16, 16), (17, None), (None, None)):
        assert class_columns(digits._replace(num_classes=classes))[0] == columns
    chain, none = digits.schedule, digits._replace(num_classes=None, null_label=None)
    numbers = digits._replace(num_classes=4, class_names=("0", "1", "2", "10"))
    named = digits._replace(num_classes=2, class_names=("a", "flower"))
    for arguments, words in (
        ({"labels": [3, 10]}, "labels: expected values in .0, 9., got 3 to 10"),
        ({"labels": [0.5]}, "labels: expected whole numbers"),
        ({"labels": "cat"}, "labels: expected a number, as the model knows no names"),
        ({"steps": 2, "chain": chain}, "steps: cannot be given with chain"),
        ({"model": numbers, "labels": "3"}, "labels: expected 0, 1, 2, 10, got '3'$"),
        ({"model": named, "labels": "Flower"}, "labels: .* 'Flower'; did you mean 'flower'"),
        ({"model": none, "labels": "cat"}, "labels: expected none: the model has no classes"),
    ):
        with pytest.raises(runs.FieldError, match=f"^{words}"):
            runs.draw(**{"key": jax.random.key(0), "model": digits, "num": 2, **arguments})


@pytest.mark.parametrize("channels", MODES)
def test_pixels_are_those_of_pillow(channels, tmp_path):
    """In a grid on white, and in files of their own; with opacity or without."""
    pixels = RNG.integers(0, 256, (1, 640, 640, channels), np.uint8)
    runs.save_samples(tmp_path / "new/samples", pixels)
    assert [file.name for file in (tmp_path / "new").rglob("*.*")] == ["00000.png"]
    picture = Image.open(tmp_path / "new/samples/00000.png")
    assert picture.mode == MODES[channels]
    np.testing.assert_array_equal(np.asarray(picture).reshape(pixels[0].shape), pixels[0])
    colour, opacity = np.split(pixels[0].astype(int), [channels - 1 + channels % 2], axis=-1)
    opacity = opacity if channels % 2 == 0 else 255
    white = np.broadcast_to((colour * opacity + 255 * (255 - opacity) + 127) // 255, (640, 640, 3))
    grid = image_grid(pixels)
    assert grid.shape == (644, 644, 3) and grid.dtype == np.uint8
    np.testing.assert_array_equal(grid[2:-2, 2:-2], white)
    assert np.all(grid[:2] == 255) and np.all(grid[:, -2:] == 255)


@pytest.mark.parametrize(("size", "columns"), [(8, 10), (64, 2)])
def test_titles_stand_above_their_columns(size, columns):
    images = RNG.uniform(-1, 1, (columns + 1, size, size, 1)).astype(np.float32)
    titles = ["Gänse", "a long name of several words", *map(str, range(13))][:columns]
    titled, plain = image_grid(images, columns, titles), image_grid(images, columns)
    above, below = np.split(titled, [len(titled) - len(plain)])
    np.testing.assert_array_equal(below, plain)
    cell = (plain.shape[1] - 2) // columns
    for part in np.split(above[:, : columns * cell], columns, axis=1):
        inked = np.flatnonzero(np.any(part < 128, (0, 2)))
        assert abs((inked[0] + inked[-1]) / 2 - cell / 2) < max(8, cell / 10), "centred"


@pytest.mark.parametrize("count", [1, 60])
def test_a_loss_is_drawn_without_a_warning(tmp_path, count):
    """A point, and a line below its median: blue on white."""
    runs.save_loss(tmp_path / "x.png", range(count), np.geomspace(1, 0.1, count))
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB"), int)
    red, _, blue = np.moveaxis(pixels, -1, 0)
    assert np.sum(blue > red + 50) > 20


@pytest.mark.parametrize("count", [1, 2])
def test_each_row_is_an_image_turning_into_noise(tmp_path, count):
    """Where β are next to nothing, an image stays what it is."""
    schedule, images = ddpm.make_schedule(np.full(9, 1e-9)), np.clip(IMAGES[:count], -1, 1)
    runs.save_forward(tmp_path / "x.png", schedule, images if count > 1 else images[0])
    titles = ["t = 0", "t = 2", "t = 4", "t = 8"]
    expected = image_grid(images.repeat(4, axis=0), titles=titles)
    found = np.asarray(Image.open(tmp_path / "x.png"), int)
    np.testing.assert_allclose(found, expected, atol=1)


def test_files_of_grids_and_of_numbers(tmp_path):
    labels, grid = np.arange(4, dtype=np.int32), image_grid(IMAGES, titles=["a", "b"])
    runs.save_samples(tmp_path / "x.png", IMAGES, columns=2, titles=["a", "b"])
    np.testing.assert_array_equal(Image.open(tmp_path / "x.png"), grid)
    runs.save_gif(tmp_path / "x.gif", [IMAGES, IMAGES / 2], titles=["a", "b"])
    with Image.open(tmp_path / "x.gif") as gif:
        assert gif.n_frames == 2 and gif.size == grid.shape[1::-1]
        gif.seek(1)
        assert gif.info["duration"] == 60 * 25, "the last one is held"
    runs.save_samples(tmp_path / "x.npz", IMAGES, labels)
    expected = {"samples": IMAGES, "labels": labels, "arr_0": to_bytes(IMAGES)}
    assert eqx.tree_equal(dict(np.load(tmp_path / "x.npz")), expected)
    names = ["../cat, big", "Gänse", "?", "犬"]
    for given, expected in ((None, "0 1 2 3"), (names, "cat-big Gänse  犬")):
        runs.save_samples(tmp_path / expected, IMAGES, labels, names=given)
        found = sorted(file.stem for file in (tmp_path / expected).iterdir())
        assert found == [f"0000{k}-{name}" for k, name in enumerate(expected.split(" "))]


def test_no_folder_is_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full/x").mkdir(parents=True)
    (tmp_path / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    holed = np.where(IMAGES == IMAGES[1, 2, 3], np.float32(np.inf), IMAGES)
    for field, wrong in (
        *(("path", {"path": path}) for path in (".", "x.jpg")),
        ("labels", {"labels": np.arange(3)}),
        ("labels", {"labels": np.arange(4), "names": ["one"]}),
        ("images", {"images": IMAGES[:0], "path": "x.png"}),
        ("titles", {"columns": 2, "titles": ["a"], "path": "x.png"}),
        *(("images", {"images": holed, "path": path}) for path in ("x.png", "x.npz", "new")),
    ):
        with pytest.raises(runs.FieldError, match=f"^{field}: expected "):
            runs.save_samples(**{"path": "new", "images": IMAGES, **wrong})
    for path in ("full", "file"):
        with pytest.raises(OSError, match=path):
            runs.save_samples(path, IMAGES)
    assert sorted(tmp_path.rglob("*")) == before
