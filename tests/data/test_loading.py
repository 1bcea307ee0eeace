"""Batches ahead of the device: the order of `batch_indices`, and what is read in it."""

import jax
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


def test_the_order_is_that_of_the_steps(key):
    order = Order(key, 23, 4)
    for steps in (range(0, 3), range(3, 12), range(7, 8), range(1, 2)):
        expected = [batch_indices(key, step, 23, 4) for step in steps]
        np.testing.assert_array_equal(order(steps), expected)


def test_rows_come_in_order_and_placed(key):
    images = np.random.default_rng(0).integers(0, 256, (40, 3, 3, 1), np.uint8)
    labels = np.arange(40, dtype=np.int32)
    order, dispatches = Order(key, 40, 8), [range(5, 7), range(7, 10), range(10, 11)]
    arrays = {"images": images, "labels": labels}
    batches = list(prefetched(arrays, order, dispatches, sharding_of(8)))
    assert len(batches) == 3
    for steps, batch in zip(dispatches, batches, strict=True):
        np.testing.assert_array_equal(batch["labels"], order(steps))
        np.testing.assert_array_equal(batch["images"], images[order(steps)])
        assert batch["images"].dtype == np.uint8
        assert batch["images"].sharding == sharding_of(8)
    assert list(prefetched(arrays, order, [], sharding_of(8))) == []


def test_what_cannot_be_read_is_named_when_its_turn_comes(key):
    class Rows:
        shape, dtype = (40, 2, 2, 1), np.dtype(np.uint8)

        def __getitem__(self, rows):
            if 17 in rows:
                raise FieldError("data", "cannot read 17.png")
            return np.zeros((*np.shape(rows), 2, 2, 1), np.uint8)

    order = Order(key, 40, 8)
    (bad,) = (step for step in range(5) if 17 in order(range(step, step + 1)))
    batches = prefetched(
        {"images": Rows()}, order, [range(step, step + 1) for step in range(5)], sharding_of(1)
    )
    for _ in range(bad):
        next(batches)
    with pytest.raises(FieldError, match="cannot read 17.png"):
        next(batches)


def test_readers_end_with_the_training(key):
    """A training that stops does not wait for what it no longer needs."""
    read = []

    class Rows:
        shape, dtype = (8, 1, 1, 1), np.dtype(np.uint8)

        def __getitem__(self, rows):
            read.append(len(read))
            return np.zeros((*np.shape(rows), 1, 1, 1), np.uint8)

    dispatches = [range(step, step + 1) for step in range(10_000)]
    batches = prefetched({"images": Rows()}, Order(key, 8, 8), dispatches, sharding_of(1))
    next(batches)
    batches.close()
    count = len(read)
    assert count < 100
    jax.block_until_ready(jax.numpy.zeros(1))
    assert len(read) <= count + 16
