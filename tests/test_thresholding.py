import jax
import jax.numpy as jnp
import numpy as np

import jax_ddpm as ddpm

X = 2 * np.random.default_rng(0).standard_normal((4, 5, 6, 3))
SCALES = np.array([0.1, 1.0, 2.0, 5.0]).reshape(4, 1, 1, 1)


def test_dynamic_is_that_of_diffusers(torch, diffusers):
    """Also for a `max_value` below 1, where the order of the two clamps decides."""
    rows = [(0.995, 1.0), (0.9, 1.5), (0.6, 3.0), (1.0, 100.0), (0.9, 0.5)]
    ours = jax.jit(lambda x: [ddpm.dynamic_threshold(*row)(x) for row in rows])(SCALES * X)
    theirs = torch.from_numpy(np.transpose(SCALES * X, (0, 3, 1, 2)))
    for (quantile, max_value), got in zip(rows, ours, strict=True):
        reference = diffusers.DDPMScheduler(
            thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=max_value
        )
        expected = reference._threshold_sample(theirs).numpy()
        np.testing.assert_allclose(np.transpose(got, (0, 3, 1, 2)), expected, rtol=1e-6, atol=1e-6)


def test_static_clips():
    np.testing.assert_array_equal(ddpm.static_threshold(1.5)(jnp.asarray(X)), np.clip(X, -1.5, 1.5))


def test_dtypes_are_kept_and_16_bits_have_their_quantiles():
    """Five of 1,000 lie above it, give or take those that bfloat16 makes equal."""
    static, dynamic = ddpm.static_threshold(2.0), jax.jit(ddpm.dynamic_threshold(0.995, 10.0))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        x = jax.ShapeDtypeStruct((2, 1000), dtype)
        assert jax.eval_shape(static, x).dtype == jax.eval_shape(dynamic, x).dtype == dtype
    x = jnp.asarray(3 * np.random.default_rng(0).standard_normal((2, 1000)), jnp.bfloat16)
    assert 0.002 < np.mean(np.abs(np.asarray(dynamic(x), float)) == 1) < 0.012
