"""The order of the data: each image once an epoch, another order in each."""

import jax
import numpy as np
import pytest

from jax_ddpm.training import batch_indices

indices = jax.jit(batch_indices, static_argnums=(2, 3))


def test_an_epoch_sees_every_image_once(key):
    epoch, later = (
        np.concatenate([indices(key, step, 20, 5) for step in steps])
        for steps in (range(4), range(4, 8))
    )
    np.testing.assert_array_equal(np.sort(epoch), np.arange(20))
    np.testing.assert_array_equal(np.sort(later), np.arange(20))
    assert np.any(later != epoch)


def test_what_does_not_fill_a_batch_is_dropped(key):
    epoch = np.concatenate([indices(key, step, 23, 5) for step in range(4)])
    assert len(set(epoch)) == 20


def test_the_order_lives_inside_a_scan(key):
    scanned = jax.lax.map(lambda step: batch_indices(key, step, 20, 5), np.arange(6))
    np.testing.assert_array_equal(scanned, [indices(key, step, 20, 5) for step in range(6)])


def test_a_batch_beyond_the_data_is_named(key):
    with pytest.raises(ValueError, match=r"batch_size: expected 1 to 20 \(the data\), got 21"):
        batch_indices(key, 0, 20, 21)
