from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHAPE = (3, 4, 4, 3)
X_T = np.random.default_rng(0).standard_normal(SHAPE)


def test_network_sees_int32_training_timesteps_and_its_output_takes_the_dtype_of_x():
    seen = []

    def denoise_fn(x, t):
        seen.append(t)
        return x.astype(jnp.bfloat16)

    short = ddpm.respace(SCHEDULE, [0, 50, 199])
    ddpm.p_mean_variance(short, denoise_fn, X_T, np.array([0, 1, 2]))
    p = ddpm.p_mean_variance(short, denoise_fn, X_T, np.int64(2))
    assert all(value.dtype == X_T.dtype for value in p)
    np.testing.assert_array_equal(seen, [[0, 50, 199], [199, 199, 199]])
    assert all(t.dtype == jnp.int32 for t in seen)


def test_a_learned_log_variance_scales_the_noise():
    """Taken for a variance it is negative, and the root of that NaN."""
    network = lambda x, t: jnp.concatenate([x / 2, jnp.full_like(x, -3)], axis=-1)
    policy = {"prediction_type": "sample", "variance_type": "learned"}

    @jax.jit
    def step(noise):
        run = partial(ddpm.p_sample_steps, None, SCHEDULE, network, noise_fn=lambda i: noise)
        return run(ddpm.SampleState(jnp.int32(100), X_T, ()), 1, **policy).x_t

    quiet, loud = (step(np.full(SHAPE, scale)) for scale in (0.0, 1.0))
    np.testing.assert_allclose(loud - quiet, np.full(SHAPE, np.exp(-1.5)), rtol=1e-9)


OUTSIDE = 2 * np.random.default_rng(0).standard_normal((4, 5, 6, 3))
SCALES = np.array([0.1, 1.0, 2.0, 5.0]).reshape(4, 1, 1, 1)


def test_dynamic_is_that_of_diffusers(torch, diffusers):
    """Also for a `max_value` below 1, where the order of the two clamps decides."""
    rows = [(0.995, 1.0), (0.9, 1.5), (0.6, 3.0), (1.0, 100.0), (0.9, 0.5)]
    ours = jax.jit(lambda x: [ddpm.dynamic_threshold(*row)(x) for row in rows])(SCALES * OUTSIDE)
    theirs = torch.from_numpy(np.transpose(SCALES * OUTSIDE, (0, 3, 1, 2)))
    for (quantile, max_value), got in zip(rows, ours, strict=True):
        reference = diffusers.DDPMScheduler(
            thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=max_value
        )
        expected = reference._threshold_sample(theirs).numpy()
        np.testing.assert_allclose(np.transpose(got, (0, 3, 1, 2)), expected, rtol=1e-6, atol=1e-6)


def test_dtypes_are_kept_and_16_bits_have_their_quantiles():
    """Five of 1,000 lie above it, give or take those that bfloat16 makes equal."""
    static, dynamic = ddpm.static_threshold(2.0), jax.jit(ddpm.dynamic_threshold(0.995, 10.0))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        x = jax.ShapeDtypeStruct((2, 1000), dtype)
        assert jax.eval_shape(static, x).dtype == jax.eval_shape(dynamic, x).dtype == dtype
    x = jnp.asarray(3 * np.random.default_rng(0).standard_normal((2, 1000)), jnp.bfloat16)
    assert 0.002 < np.mean(np.abs(np.asarray(dynamic(x), float)) == 1) < 0.012
