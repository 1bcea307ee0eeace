import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jax_ddpm as ddpm
from jax_ddpm.noise import noise_source, seed_key

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
        return noise_source(None, lambda i: noise, jnp.zeros(SHAPE, jnp.float32))(0)

    assert injected(np.ones(SHAPE)).dtype == jnp.float32
    with pytest.raises(ValueError, match=r"^output of noise_fn: expected shape \(3, 4, 4, 3\)"):
        injected(np.ones(SHAPE[1:]))  # would broadcast: every sample would get the same
    with pytest.raises(TypeError, match="^output of noise_fn: expected a floating array"):
        injected(np.ones(SHAPE, int))


def test_every_seed_is_a_stream_of_its_own(untyped):
    """With JAX's 32 bits too; below 2**32 it is JAX's own key."""
    seeds = (0, 1, 2**32 - 1, 2**32, 2**32 + 1, np.int64(2**62), 2**63 - 1)
    with jax.enable_x64(False):
        keys = [jax.random.key_data(seed_key(seed)) for seed in seeds]
        own = [jax.random.key_data(jax.random.key(seed)) for seed in seeds[:3]]
    np.testing.assert_array_equal(keys[:3], own)
    assert len(np.unique(keys, axis=0)) == len(seeds)
