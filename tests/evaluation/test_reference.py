"""Sets of images against real ones: the order that figures must have, floors, devices, copies."""

import jax
import numpy as np
import pytest

from jax_ddpm.data import Dataset, load_dataset, to_bytes
from jax_ddpm.evaluation import FeatureNetwork, save_statistics, statistics, train_classifier
from jax_ddpm.evaluation.extraction import KEPT, extract
from jax_ddpm.evaluation.reference import reference_of_file, reference_of_images

pytestmark = pytest.mark.usefixtures("defaults")


def pixel_means(size):
    """Features with a closed form: means of quarters, and logits that are not kept."""

    def apply_fn(variables, images):
        x = images.astype(np.float32)
        half = x.shape[1] // 2
        quarters = [x[:, a : a + half, b : b + half] for a in (0, half) for b in (0, half)]
        features = jax.numpy.stack([each.mean((1, 2, 3)) for each in quarters], axis=-1)
        return {"2048": features * variables, "logits_unbiased": features}

    return FeatureNetwork(apply_fn, np.float32(size), "2048", "means")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


@pytest.fixture(scope="module")
def target(digits):
    return reference_of_images(digits, None, 500)


def test_the_better_the_images_the_nearer(digits, target):
    """Digits that the classifier has not seen, blurred ones, inverted ones, noise."""
    random = np.random.default_rng(0)
    pixels = to_bytes(digits.images)
    other = pixels[random.permutation(len(pixels))[:500]]
    blurred = other * 0.5 + np.roll(other, 1, axis=1) * 0.25 + np.roll(other, 1, axis=2) * 0.25
    noise = random.integers(0, 256, other.shape)
    names = ("classifier_frechet_distance", "classifier_kernel_distance")
    found = [
        target.measure([np.asarray(images).astype(np.uint8)], 500)
        for images in (other, blurred, noise)
    ]
    for name in names:
        values = [target.floor[name], *(figures[name] for figures in found)]
        assert values[0] < 0.5 * values[2] and values[1] < values[2] < values[3], values
    assert found[0]["precision"] > 0.8 > found[2]["precision"]
    assert found[0]["recall"] > 0.8 > found[2]["recall"]


def test_the_floor_is_like_for_like(digits, target):
    """As many of the half that was held out as there are samples."""
    assert target.at_most == 500
    assert reference_of_images(digits, None, 5000).at_most == len(digits.images) // 2
    assert 0 < target.floor["classifier_frechet_distance"] < 1
    assert target.learned.statistics["features"].num == len(digits.images)


def test_copies_are_seen(digits, target):
    pixels = to_bytes(digits.images)
    learned = pixels[np.random.default_rng(1).permutation(len(pixels))[:300]]
    figures = target.measure([learned], 300)
    assert figures["nearest"] < 1e-5 and figures["nearer_than_1_percent"] == 1
    mirrored = target.measure([learned[:, :, ::-1]], 300)
    assert mirrored["nearest"] > 0.5 * mirrored["nearest_real"]
    assert mirrored["nearer_than_1_percent"] < 0.05


def test_the_same_images_and_seed_give_the_same_classifier(digits):
    pixels = to_bytes(digits.images[:100])
    one, other = (train_classifier(pixels, digits.labels[:100]) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
    assert one.description == other.description and "the labels of 100" in one.description
    features = np.asarray(one(pixels)["features"])
    assert features.shape == (100, 64) and 0.5 < np.sqrt((features**2).mean()) < 2


@pytest.mark.parametrize("shape", [(6, 6, 1), (40, 33, 3)])
def test_without_labels_it_learns_turns(shape):
    """Bright above: a classifier that tells turns apart has features that tell them apart."""
    random = np.random.default_rng(0)
    images = random.integers(0, 80, (60, *shape)).astype(np.uint8)
    images[:, : shape[0] // 2] += 150
    network = train_classifier(images)
    assert "the turns of 60" in network.description
    up, down = (np.asarray(network(each)["features"]) for each in (images, images[:, ::-1]))
    assert np.linalg.norm(up.mean(0) - down.mean(0)) > 2 * up.std(0).max()


def test_statistics_do_not_depend_on_batches_or_devices():
    """The means of quarters, computed by NumPy: images come in batches of any size, and eight
    devices share them."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (203, 4, 4, 3)).astype(np.uint8)
    quarters = images.reshape(203, 2, 2, 2, 2, 3).mean((2, 4, 5)).reshape(203, 4)
    for sizes in ((203,), (1, 64, 64, 3, 71), (100, 103)):
        batches = np.split(images, np.cumsum(sizes)[:-1])
        found = extract(pixel_means(2.0), iter(batches), 203)
        assert found.statistics["2048"].num == 203 and len(found.kept) == min(203, KEPT)
        np.testing.assert_allclose(found.statistics["2048"].mu, 2 * quarters.mean(0), rtol=1e-5)
        expected = 4 * np.cov(quarters, rowvar=False)
        np.testing.assert_allclose(found.statistics["2048"].sigma, expected, rtol=1e-4, atol=1e-2)
        assert found.score.mean > 1


def test_statistics_of_a_file_stand_for_images(tmp_path):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (64, 4, 4, 3)).astype(np.uint8)

    def wide(variables, x):
        means = x.astype(np.float32).mean((1, 2, 3))[:, None]
        return {"2048": means * np.linspace(1, 2, 2048, dtype=np.float32), "64": means}

    network = FeatureNetwork(wide, None, "2048", "wide")
    rows = np.asarray(wide(None, images)["2048"])
    save_statistics(tmp_path / "x.npz", statistics(rows))
    target = reference_of_file(tmp_path / "x.npz", network)
    figures = target.measure([images], 64)
    assert set(figures) == {"fid"} and abs(figures["fid"]) < 1e-3 * rows.var(0).sum()
    save_statistics(tmp_path / "x.npz", statistics(rows[:, :100]))
    with pytest.raises(ValueError, match="expected mu of 64, 192, 768, 2048.*got 100"):
        reference_of_file(tmp_path / "x.npz", network)


def test_windows_are_cut_from_the_center():
    """Of images that a training sees in random windows, each of its own extent."""
    images = np.arange(2 * 6 * 6, dtype=np.uint8).reshape(2, 6, 6, 1)
    data = load_windows(images)
    whole = data.whole(np.arange(2))
    np.testing.assert_array_equal(whole[0], images[0, 1:5, 1:5])
    np.testing.assert_array_equal(whole[1], images[1, 0:4, 1:5])


def load_windows(images):
    from jax_ddpm.data import Preparation

    preparation = Preparation(image_size=4, crop="random")
    extents = np.asarray([[6, 6], [4, 6]], np.int32)
    return Dataset(images, preparation=preparation, extents=extents)


@pytest.mark.usefixtures("untyped")
def test_too_few_images_are_refused(digits):
    with pytest.raises(
        ValueError, match="data: expected two images or more, half of which are held out"
    ):
        reference_of_images(digits._replace(images=digits.images[:1]), None, 10)


def test_copies_are_seen_beside_duplicates(digits):
    """Images that are twice in the data do not hide what was copied."""
    images = np.concatenate([digits.images, digits.images[:60]])
    twice = Dataset(images, np.concatenate([digits.labels, digits.labels[:60]]))
    target = reference_of_images(twice, None, 200)
    copied = target.measure([to_bytes(digits.images[500:700])], 200)
    assert copied["nearer_than_1_percent"] == 1
