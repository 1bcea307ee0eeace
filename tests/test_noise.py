import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_ddpm as ddpm
from jax_ddpm.noise import noise_source

SHAPE = (3, 4, 4, 3)


@jax.jit
def draw(key, i, first_sample):
    """Entry and first sample are traced, as in a scan over the batches of a large set."""
    return ddpm.sample_noise(key, i, SHAPE, first_sample=first_sample)


def test_draws_are_those_documented(key):
    """To the bit: sample `first_sample + j` at entry `i` has a key of its own."""
    normal = jax.jit(lambda key: jax.random.normal(key, SHAPE[1:]))
    for j, drawn in enumerate(draw(key, 10, 5)):
        own_key = jax.random.fold_in(jax.random.fold_in(key, 5 + j), 10)
        np.testing.assert_array_equal(drawn, normal(own_key))


def test_another_sample_or_entry_or_key_gets_other_noise(key):
    keys = (key, jax.random.key(1))
    drawn = np.stack([draw(key, i, 16) for key in keys for i in range(3)])
    assert np.unique(drawn).size == drawn.size
    np.testing.assert_array_equal(draw(key, 0, 17)[0], drawn[0, 1])  # the same sample, elsewhere


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_noise_is_drawn_where_the_sharding_says(key, kind):
    mesh = jax.make_mesh((2,), ("data",), axis_types=(kind,))
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    shape = (4, *SHAPE[1:])
    drawn = jax.jit(lambda key: ddpm.sample_noise(key, 10, shape, sharding=sharding))(key)
    assert drawn.sharding.is_equivalent_to(sharding, drawn.ndim)
    np.testing.assert_array_equal(np.asarray(drawn)[:3], draw(key, 10, 0))


def test_injected_noise_is_checked_and_takes_the_dtype(untyped):
    def injected(noise):
        return noise_source(None, lambda i: noise, jnp.zeros(SHAPE, jnp.float32), 0)(0)

    assert injected(np.ones(SHAPE)).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"^output of noise_fn: expected shape \(3, 4, 4, 3\)"):
        injected(np.ones(SHAPE[1:]))  # would broadcast: every sample would get the same
    with pytest.raises(TypeError, match="^output of noise_fn: expected a floating array"):
        injected(np.ones(SHAPE, int))
