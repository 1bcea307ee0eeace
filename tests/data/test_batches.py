"""What a step sees: the order of the images, flips and windows, and batches ahead of the device."""

import threading

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_ddpm._errors import FieldError
from jax_ddpm.data import batch_indices, random_crop, random_flip
from jax_ddpm.data.batches import Order, augmentation, prefetched
from jax_ddpm.training.sharding import data_sharding, device_mesh

pytestmark = pytest.mark.usefixtures("defaults")
IMAGES = np.random.default_rng(0).integers(0, 256, (64, 6, 9, 3), np.uint8)


def test_an_epoch_sees_each_image_once_in_an_order_of_its_own(key):
    """Those that do not fill a batch are dropped."""
    steps = [batch_indices(key, step, 23, 5) for step in range(8)]
    epoch, later = np.concatenate(steps[:4]), np.concatenate(steps[4:])
    assert len(set(epoch)) == len(set(later)) == 20
    assert set(epoch) | set(later) <= set(range(23)) and np.any(later != epoch)
    scanned = jax.lax.map(lambda step: batch_indices(key, step, 23, 5), np.arange(8))
    np.testing.assert_array_equal(scanned, steps)


def test_half_of_the_images_are_mirrored(key):
    images = np.broadcast_to(np.arange(4, dtype=np.uint8)[None, None, :, None], (4000, 1, 4, 1))
    flipped = np.asarray(jax.jit(random_flip)(key, images))
    mirrored = flipped[:, 0, 0, 0] == 3
    np.testing.assert_array_equal(flipped[mirrored], images[mirrored][:, :, ::-1])
    np.testing.assert_array_equal(flipped[~mirrored], images[~mirrored])
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(4000)


def test_every_window_of_what_an_image_holds_is_as_likely(key):
    number, picture = 10_000, np.zeros((1, 8, 9, 1), np.uint8)
    picture[0, :5, :7, 0] = 1 + np.arange(35).reshape(5, 7)
    images, extents = np.repeat(picture, number, axis=0), np.full((number, 2), [5, 7], np.int32)
    windows = jax.jit(random_crop, static_argnums=2)(key, images, 4, extents)
    found, counts = np.unique(windows, axis=0, return_counts=True)
    every = np.lib.stride_tricks.sliding_window_view(picture[0, :5, :7], (4, 4), (0, 1))
    np.testing.assert_array_equal(found, every.reshape(8, 4, 4, 1))
    assert np.all(np.abs(counts - number / 8) < 5 * np.sqrt(number / 8 * 7 / 8))


def test_a_sample_draws_the_same_in_any_batch_and_on_any_device(key):
    augment = jax.jit(augmentation(5, True))
    whole = augment(key, IMAGES)
    assert whole.dtype == np.uint8 and whole.shape == (64, 5, 5, 3)
    np.testing.assert_array_equal(augment(key, IMAGES[:7]), whole[:7])
    placed = jax.device_put(IMAGES, data_sharding(device_mesh(64)))
    assert len(placed.sharding.device_set) == jax.device_count() > 1
    np.testing.assert_array_equal(augment(key, placed), whole)
    assert np.any(whole != augmentation(5, False)(key, IMAGES))
    np.testing.assert_array_equal(augmentation(None, False)(key, IMAGES), IMAGES)


def sharding_of(batch):
    placed = data_sharding(device_mesh(batch))
    return NamedSharding(placed.mesh, PartitionSpec(None, *placed.spec))


class Rows:
    """Forty images whose reading is recorded, and fails of one."""

    shape, dtype = (40, 2, 2, 1), np.dtype(np.uint8)

    def __init__(self, bad=None):
        self.bad, self.read = bad, []

    def __getitem__(self, rows):
        self.read.append(rows)
        if self.bad in rows:
            raise FieldError("data", f"cannot read {self.bad}.png")
        return np.zeros((*np.shape(rows), 2, 2, 1), np.uint8)


def test_batches_come_in_the_order_of_the_steps_and_placed(key):
    images = np.random.default_rng(0).integers(0, 256, (43, 3, 3, 1), np.uint8)
    order, dispatches = Order(key, 43, 8), [range(3, 7), range(7, 10), range(1, 2)]
    arrays = {"images": images, "labels": np.arange(43, dtype=np.int32)}
    batches = prefetched(arrays, order, dispatches, sharding_of(8))
    for steps, batch in zip(dispatches, batches, strict=True):
        expected = np.stack([batch_indices(key, step, 43, 8) for step in steps])
        np.testing.assert_array_equal(batch["labels"], expected)
        np.testing.assert_array_equal(batch["images"], images[expected], strict=True)
        assert batch["images"].sharding == sharding_of(8)
    assert list(prefetched(arrays, order, [], sharding_of(8))) == []


def test_what_cannot_be_read_is_named_in_its_turn_and_readers_end_with_the_training(key):
    """They are at most 16 dispatches ahead, and a training that stops leaves none at work."""
    before, order = set(threading.enumerate()), Order(key, 40, 8)
    dispatches = [range(step, step + 1) for step in range(10_000)]
    (turn,) = (step for step in range(5) if 17 in order(dispatches[step]))
    rows = Rows(bad=17), Rows()
    bad, good = (prefetched({"images": each}, order, dispatches, sharding_of(1)) for each in rows)
    for _ in range(turn):
        next(bad)
    with pytest.raises(FieldError, match="cannot read 17.png"):
        next(bad)
    next(good)
    good.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert 1 <= len(rows[1].read) <= 1 + 16
