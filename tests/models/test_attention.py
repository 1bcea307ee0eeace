"""Attention in blocks is attention, in memory that grows with the tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.models.attention import dot_product_attention


def attend(query, key, value):
    return dot_product_attention(query, key, value, precision="highest")


def formula(query, key, value):
    """Vaswani et al. 2017, eq. 1, of one head and image at a time, in NumPy."""
    out = np.empty_like(query)
    for image, head in np.ndindex(query.shape[0], query.shape[2]):
        q, k, v = (np.asarray(x)[image, :, head] for x in (query, key, value))
        weights = np.exp(q @ k.T / np.sqrt(q.shape[-1]))
        out[image, :, head] = weights @ v / weights.sum(axis=1, keepdims=True)
    return out


@pytest.mark.parametrize("tokens", [5, 401], ids=["one block", "blocks of odd length"])
def test_is_the_formula_and_so_is_its_gradient(tokens):
    rng = np.random.default_rng(0)
    inputs, directions = rng.standard_normal((2, 3, 2, tokens, 3, 4))

    def loss(*inputs):
        out = attend(*inputs)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*inputs)
    np.testing.assert_allclose(out, formula(*inputs), rtol=0, atol=1e-13)
    # A slope of the formula's, from two of its values.
    slope = np.sum(np.stack(gradients) * directions)
    ends = [np.sin(formula(*(inputs + step * directions))).sum() for step in (1e-5, -1e-5)]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / 2e-5, rtol=1e-7)


def test_memory_is_linear_in_the_tokens():
    def temporaries(tokens):
        shape = jax.ShapeDtypeStruct((1, tokens, 8, 8), jnp.float32)
        gradient = jax.grad(lambda *inputs: jnp.sum(attend(*inputs)), (0, 1, 2))
        programs = (jax.jit(f).lower(shape, shape, shape).compile() for f in (attend, gradient))
        return [program.memory_analysis().temp_size_in_bytes for program in programs]

    for few, many in zip(temporaries(1024), temporaries(4096), strict=True):
        assert many < 4 * few
