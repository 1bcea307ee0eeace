"""Sets of images against real ones: the order that figures must have, floors, devices, copies."""

import gc
import weakref

import jax
import numpy as np
import pytest

from jax_ddpm.data import Dataset, Preparation, load_dataset, to_bytes
from jax_ddpm.evaluation import FeatureNetwork, train_classifier
from jax_ddpm.evaluation.features import extract
from jax_ddpm.evaluation.reference import reference_of_images

pytestmark = pytest.mark.usefixtures("defaults")


def pixel_means(size):
    """Features with a closed form: means of quarters of 4×4 images, and logits, not kept."""

    def apply_fn(variables, images):
        x = images.astype(np.float32).reshape(len(images), 2, 2, 2, 2, 3)
        features = x.mean((2, 4, 5)).reshape(len(images), 4)
        return {"2048": features * variables, "logits_unbiased": features}

    return FeatureNetwork(apply_fn, np.float32(size), "2048", "means")


@pytest.fixture(scope="module")
def digits():
    """300 of 4×4, the means of 2×2 pixels, sorted by class, as files often are."""
    data = load_dataset("digits")
    images = data.images[:300].reshape(300, 4, 2, 4, 2, 1).mean((2, 4))
    order = np.argsort(data.labels[:300], stable=True)
    return Dataset(to_bytes(images[order]), data.labels[order])


@pytest.fixture(scope="module")
def target(digits):
    return reference_of_images(digits, None, 100)


def test_the_better_the_images_the_nearer(digits, target):
    """Digits, half of which the classifier has not seen, blurred ones, noise."""
    other = digits.images[np.random.default_rng(0).permutation(300)[50:250]]
    blurred = other * 0.5 + np.roll(other, 1, axis=1) * 0.25 + np.roll(other, 1, axis=2) * 0.25
    noise = np.random.default_rng(0).integers(0, 256, other.shape)
    found = [target.measure([x.astype(np.uint8)], 100) for x in (other, blurred, noise)]
    for name in ("classifier_frechet_distance", "classifier_kernel_distance"):
        values = [target.floor[name], *(figures[name] for figures in found)]
        assert values[0] < 0.5 * values[2] and values[1] < values[2] < values[3], values
    assert found[0]["precision"] > 0.8 > found[2]["precision"]
    assert found[0]["recall"] > 0.8 > found[2]["recall"]


def test_the_floor_is_like_for_like_and_always_the_same(digits, target):
    """As many held-out images as samples; the classifier learns from data and seed alone."""
    again = reference_of_images(digits, None, 5000)
    assert (target.at_most, again.at_most) == (100, 150)
    assert target.measure([digits.images], 300) == target.measure([digits.images[:100]], 100)
    assert 0.01 < target.floor["classifier_frechet_distance"] < 1
    assert target.real.statistics["features"].num == 150
    jax.tree.map(np.testing.assert_array_equal, again.network.variables, target.network.variables)
    assert "the labels of 150" in target.network.description
    assert target.learned.shape == (300, 64)
    assert 0.5 < np.sqrt((target.learned**2).mean()) < 2


def test_copies_are_seen(digits, target):
    learned = digits.images[np.random.default_rng(1).permutation(300)[:100]]
    figures = target.measure([learned], 100)
    assert figures["nearest"] < 1e-5 and figures["nearer_than_1_percent"] == 1
    mirrored = target.measure([learned[:, :, ::-1]], 100)
    assert mirrored["nearest"] > 0.5 * mirrored["nearest_real"]
    assert mirrored["nearer_than_1_percent"] < 0.05
    # Images that are twice in the data do not hide what was copied.
    rows = np.r_[0:270, 0:30]
    target = reference_of_images(Dataset(digits.images[rows], digits.labels[rows]), None, 100)
    assert target.measure([digits.images[200:270]], 70)["nearer_than_1_percent"] == 1


@pytest.mark.parametrize("shape", [pytest.param((6, 6, 1), marks=pytest.mark.slow), (40, 33, 3)])
def test_without_labels_it_learns_turns(shape):
    """Bright above: a classifier that tells turns apart has features that tell them apart. Its
    programs live as long as it does."""
    images = np.random.default_rng(0).integers(0, 80, (16, *shape)).astype(np.uint8)
    images[:, : shape[0] // 2] += 150
    network = train_classifier(images)
    assert "the turns of 16" in network.description
    up, down = (np.asarray(network(each)["features"]) for each in (images, images[:, ::-1]))
    assert np.linalg.norm(up.mean(0) - down.mean(0)) > 2 * up.std(0).max()
    extract(network, [images], 16)
    function = weakref.ref(network.apply_fn)
    del network
    gc.collect()
    assert function() is None


def test_statistics_do_not_depend_on_batches_or_devices():
    """Against NumPy's, over batches of any size, which the devices share; all batches are read."""
    images = np.random.default_rng(0).integers(0, 256, (303, 4, 4, 3)).astype(np.uint8)
    quarters = images[:203].reshape(203, 2, 2, 2, 2, 3).mean((2, 4, 5)).reshape(203, 4)
    for sizes in ((303,), (1, 64, 64, 3, 171), (100, 103, 100)):
        batches = iter(np.split(images, np.cumsum(sizes)[:-1]))
        found = extract(pixel_means(2.0), batches, 203)
        (num, mu, sigma), expected = found.statistics["2048"], 4 * np.cov(quarters, rowvar=False)
        assert num == len(found.kept) == 203 and next(batches, None) is None
        np.testing.assert_allclose(mu, 2 * quarters.mean(0), rtol=1e-5)
        np.testing.assert_allclose(sigma, expected, rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(found.logits, quarters, rtol=1e-5)


def test_with_inception_all_real_images_are_compared():
    images = np.random.default_rng(0).integers(0, 256, (64, 4, 4, 3)).astype(np.uint8)
    reference = reference_of_images(Dataset(images), pixel_means(1.0), 64)
    figures = reference.measure([images[:40], images[40:]], 64)
    assert reference.at_most is None and figures["fid"] == pytest.approx(0, abs=1e-3)
    assert {"kid", "precision", "nearest"} < figures.keys() and figures["recall"] == 1
    for few, known in ((1, False), (2, True)):
        figures = reference.measure([images[:few]], few)
        assert ("kid" in figures) == known and "recall" not in figures
    with pytest.raises(ValueError, match="data: expected two images or more, half of which are he"):
        reference_of_images(Dataset(images[:1]), None, 10)


def test_windows_are_cut_from_the_center():
    """Of images that a training sees in random windows, each of its own extent."""
    images = np.arange(2 * 6 * 6, dtype=np.uint8).reshape(2, 6, 6, 1)
    extents, windows = np.int32([[6, 6], [4, 6]]), Preparation(image_size=4, crop="random")
    whole = Dataset(images, preparation=windows, extents=extents).whole(np.arange(2))
    np.testing.assert_array_equal(whole, [images[0, 1:5, 1:5], images[1, 0:4, 1:5]])
