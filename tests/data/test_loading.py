"""Batches ahead of the device: the order of `batch_indices`, and what is read in it."""

import threading

import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jax_ddpm._checks import FieldError
from jax_ddpm.data import batch_indices
from jax_ddpm.data.loading import Order, prefetched
from jax_ddpm.training.sharding import data_sharding, device_mesh

pytestmark = pytest.mark.usefixtures("defaults")


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


def test_rows_come_in_the_order_of_the_steps_and_placed(key):
    images = np.random.default_rng(0).integers(0, 256, (43, 3, 3, 1), np.uint8)
    order, dispatches = Order(key, 43, 8), [range(3, 7), range(7, 10), range(1, 2)]
    arrays = {"images": images, "labels": np.arange(43, dtype=np.int32)}
    batches = list(prefetched(arrays, order, dispatches, sharding_of(8)))
    assert len(batches) == 3
    for steps, batch in zip(dispatches, batches, strict=True):
        expected = np.stack([batch_indices(key, step, 43, 8) for step in steps])
        np.testing.assert_array_equal(order(steps), expected)
        np.testing.assert_array_equal(batch["labels"], expected)
        np.testing.assert_array_equal(batch["images"], images[expected])
        assert batch["images"].dtype == np.uint8
        assert batch["images"].sharding == sharding_of(8)
    assert list(prefetched(arrays, order, [], sharding_of(8))) == []


def test_what_cannot_be_read_is_named_when_its_turn_comes(key):
    order, dispatches = Order(key, 40, 8), [range(step, step + 1) for step in range(5)]
    (turn,) = (number for number, steps in enumerate(dispatches) if 17 in order(steps))
    batches = prefetched({"images": Rows(bad=17)}, order, dispatches, sharding_of(1))
    for _ in range(turn):
        next(batches)
    with pytest.raises(FieldError, match="cannot read 17.png"):
        next(batches)


def test_readers_end_with_the_training(key):
    """They are at most 16 dispatches ahead, and a training that stops leaves none at work."""
    before, rows = set(threading.enumerate()), Rows()
    dispatches = [range(step, step + 1) for step in range(10_000)]
    batches = prefetched({"images": rows}, Order(key, 40, 8), dispatches, sharding_of(1))
    next(batches)
    batches.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(60)
        assert not thread.is_alive()
    assert 1 <= len(rows.read) <= 1 + 16
