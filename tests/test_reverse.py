"""One step of either process as users call it; `tests/parity` compares values with torch."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHAPE = (3, 4, 4, 3)
X_T, NOISE = np.random.default_rng(0).standard_normal((2, *SHAPE))
PREDICT = [value for name, value in vars(ddpm).items() if name.startswith("predict_")]


@pytest.mark.parametrize("function", [ddpm.q_sample, *PREDICT])
def test_jit_vmap_and_batch(function):
    function, arguments = partial(function, SCHEDULE), (X_T, np.array([3, 120, 199]), NOISE)
    whole, alone = function(*arguments), function(*(each[2:] for each in arguments))
    assert whole.shape == SHAPE
    np.testing.assert_array_equal(alone, whole[2:])
    each = jax.jit(jax.vmap(function))(*arguments)
    np.testing.assert_allclose(each, whole, rtol=1e-12, atol=1e-12)


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
    state = ddpm.SampleState(jnp.int32(100), jnp.asarray(X_T), ())

    @jax.jit
    def step(noise):
        options = {"noise_fn": lambda i: noise, **policy}
        return ddpm.p_sample_steps(None, SCHEDULE, network, state, 1, **options).x_t

    quiet, loud = step(np.zeros(SHAPE)), step(np.ones(SHAPE))
    np.testing.assert_allclose(loud - quiet, np.full(SHAPE, np.exp(-1.5)), rtol=1e-9)


def test_dynamic_is_that_of_diffusers(torch, diffusers):
    """Also for a `max_value` below 1, where the order of the two clamps decides."""
    outside = np.random.default_rng(0).standard_normal((4, 5, 6, 3))
    outside *= np.reshape([0.2, 2.0, 4.0, 10.0], (4, 1, 1, 1))
    for row in ((0.995, 1.0), (0.9, 1.5), (0.6, 3.0), (1.0, 100.0), (0.9, 0.5)):
        settings = zip(("dynamic_thresholding_ratio", "sample_max_value"), row, strict=True)
        reference = diffusers.DDPMScheduler(thresholding=True, **dict(settings))
        # The quantile is over all of an image's numbers, in whatever order.
        expected = reference._threshold_sample(torch.from_numpy(outside)).numpy()
        got = ddpm.dynamic_threshold(*row)(jnp.asarray(outside))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_dtypes_are_kept_and_16_bits_have_their_quantiles():
    """Five of 1,000 lie above it, give or take those that bfloat16 makes equal."""
    static, dynamic = ddpm.static_threshold(2.0), jax.jit(ddpm.dynamic_threshold(0.995, 10.0))
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        x = jax.ShapeDtypeStruct((2, 1000), dtype)
        assert jax.eval_shape(static, x).dtype == jax.eval_shape(dynamic, x).dtype == dtype
    x = jnp.asarray(3 * np.random.default_rng(0).standard_normal((2, 1000)), jnp.bfloat16)
    assert 0.002 < np.mean(np.abs(np.asarray(dynamic(x), float)) == 1) < 0.012
