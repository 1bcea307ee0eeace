"""The maths knows no framework: a Flax NNX module goes through the same loop as plain arrays."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(20))
SHAPE = (2, 4, 4, 3)


class Network(nnx.Module):
    """One hidden layer for each pixel, and the timestep."""

    def __init__(self, rngs: nnx.Rngs):
        self.inwards = nnx.Linear(3, 8, param_dtype=jnp.float64, rngs=rngs)
        self.outwards = nnx.Linear(8, 3, param_dtype=jnp.float64, rngs=rngs)

    def __call__(self, x, t):
        time = jnp.cos(t.astype(x.dtype)).reshape(-1, 1, 1, 1)
        return self.outwards(jnp.tanh(self.inwards(x) + time))


def test_an_nnx_module_is_a_denoise_fn(key):
    module = Network(nnx.Rngs(0))
    graphdef, state = nnx.split(module)

    @jax.jit
    def draw(key, state):
        def denoise_fn(x, t):
            return nnx.merge(graphdef, state)(x, t)

        return ddpm.p_sample_loop(key, SCHEDULE, denoise_fn, SHAPE)

    layers = [(layer.kernel, layer.bias) for layer in (module.inwards, module.outwards)]
    (w_in, b_in), (w_out, b_out) = jax.tree.map(np.asarray, [(w[...], b[...]) for w, b in layers])

    def plain(x, t):
        """The same weights in NumPy's notation, with x as rows of pixels."""
        time = jnp.repeat(jnp.cos(t.astype(x.dtype)), x[0, ..., 0].size)[:, None]
        hidden = jnp.tanh(x.reshape(-1, 3) @ w_in + b_in[None] + time)
        return (hidden @ w_out + b_out[None]).reshape(x.shape)

    expected = jax.jit(lambda key: ddpm.p_sample_loop(key, SCHEDULE, plain, SHAPE))(key)
    np.testing.assert_allclose(draw(key, state), expected, rtol=1e-12, atol=1e-12)
    draw(jax.random.key(1), jax.tree.map(lambda w: 2 * w, state))
    assert draw._cache_size() == 1
