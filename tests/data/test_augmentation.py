"""Flips and windows: what is drawn belongs to the sample, and is as likely as it should be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm._checks import FieldError
from jax_ddpm.data import random_crop, random_flip
from jax_ddpm.data.augmentation import augmentation
from jax_ddpm.training.sharding import data_sharding, device_mesh

pytestmark = pytest.mark.usefixtures("defaults")
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 9, 3), np.uint8)


def test_half_of_the_images_are_mirrored(key):
    images = np.broadcast_to(np.arange(4, dtype=np.uint8)[None, None, :, None], (4000, 1, 4, 1))
    flipped = np.asarray(jax.jit(random_flip)(key, images))
    mirrored = flipped[:, 0, 0, 0] == 3
    np.testing.assert_array_equal(flipped[mirrored], images[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_every_window_is_as_likely(key):
    """Of a picture whose pixels are numbered, by their upper left."""
    number = 10_000
    picture = np.arange(5 * 7, dtype=np.uint8).reshape(1, 5, 7, 1)
    windows = jax.jit(lambda x: random_crop(key, x, 4))(np.repeat(picture, number, axis=0))
    found = np.asarray(windows)[:, 0, 0, 0]
    places, counts = np.unique(found, return_counts=True)
    assert places.tolist() == [row * 7 + column for row in range(2) for column in range(4)]
    expected = number / 8
    assert np.all(np.abs(counts - expected) < 5 * np.sqrt(expected * 7 / 8))
    for window in np.asarray(windows)[:50]:
        row, column = divmod(int(window[0, 0, 0]), 7)
        np.testing.assert_array_equal(window, picture[0, row : row + 4, column : column + 4])


def test_windows_stay_in_what_each_image_holds(key):
    images = np.zeros((600, 8, 8, 1), np.uint8)
    extents = np.tile(np.array([[4, 4], [4, 8], [8, 5]], np.int32), (200, 1))
    for image, (height, width) in zip(images, extents, strict=True):
        image[:height, :width] = 9
    windows = jax.jit(random_crop, static_argnums=2)(key, images, 4, extents)
    assert np.all(np.asarray(windows) == 9)


def test_a_sample_draws_the_same_in_any_batch_and_on_any_device(key):
    augment = jax.jit(augmentation(5, True))
    whole = augment(key, IMAGES)
    assert whole.dtype == np.uint8 and whole.shape == (64, 5, 5, 3)
    np.testing.assert_array_equal(augment(key, IMAGES[:7]), whole[:7])
    placed = jax.device_put(IMAGES, data_sharding(device_mesh(64)))
    assert len(placed.sharding.device_set) == jax.device_count() > 1
    np.testing.assert_array_equal(augment(key, placed), whole)


def test_nothing_is_done_where_nothing_is_asked_for(key):
    np.testing.assert_array_equal(augmentation(None, False)(key, jnp.asarray(IMAGES)), IMAGES)


def test_a_window_larger_than_the_image_is_refused(key, untyped):
    with pytest.raises(FieldError, match="size: expected 1 to 6, got 7"):
        random_crop(key, IMAGES, 7)
