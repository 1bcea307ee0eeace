import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm


@pytest.mark.parametrize(("channels", "count"), [(3, 151_427), (1, 149_121)])
def test_parameters(key, channels, count):
    """The tutorial's has 151,427; a channel less saves 2 × 9 × 64 weights and one bias."""
    x, t = jnp.zeros((1, 8, 8, channels), jnp.float32), jnp.zeros((1,), jnp.int32)
    shapes = jax.eval_shape(ddpm.SimpleUNet(channels).init, key, x, t)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


def test_any_size_and_dtype(key):
    model = ddpm.SimpleUNet(dtype=jnp.bfloat16)
    x, t = np.zeros((2, 5, 9, 3), np.float32), np.array([0, 199])
    output, variables = jax.eval_shape(model.init_with_output, key, x, t)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(variables))
    assert output.shape == x.shape and output.dtype == jnp.bfloat16


def test_wrong_channels_are_named(untyped, key):
    with pytest.raises(ValueError, match=r"x: expected shape \(1, 8, 8, 3\), got \(1, 8, 8, 1\)"):
        ddpm.SimpleUNet().init(key, np.zeros((1, 8, 8, 1)), np.zeros((1,), np.int32))
