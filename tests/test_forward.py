import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])
FUNCTIONS = [
    ddpm.q_sample,
    ddpm.predict_v,
    ddpm.predict_xstart_from_eps,
    ddpm.predict_eps_from_xstart,
    ddpm.predict_xstart_from_v,
    ddpm.predict_eps_from_v,
]


@pytest.fixture
def pair(key):
    return jax.random.normal(key, (2, 4, 5, 6, 3))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_jit_vmap_and_batch(function, pair):
    a, b = pair
    expected = function(SCHEDULE, a, T, b)
    assert expected.shape == a.shape
    jitted = jax.jit(function)
    np.testing.assert_allclose(jitted(SCHEDULE, a, T, b), expected, rtol=1e-12, atol=1e-12)
    jitted(SCHEDULE, b, T, a)
    assert jitted._cache_size() == 1
    each = jax.vmap(function, in_axes=(None, 0, 0, 0))(SCHEDULE, a, T, b)
    np.testing.assert_allclose(each, expected, rtol=1e-12, atol=1e-12)
    alone = function(SCHEDULE, a[2:3], T[2:3], b[2:3])
    np.testing.assert_array_equal(alone, expected[2:3])


def test_conversions_return_what_made_x_t(pair):
    x_start, noise = pair
    x_t = ddpm.q_sample(SCHEDULE, x_start, T, noise)
    v = ddpm.predict_v(SCHEDULE, x_start, T, noise)
    for got, expected in [
        (ddpm.predict_xstart_from_eps(SCHEDULE, x_t, T, noise), x_start),
        (ddpm.predict_eps_from_xstart(SCHEDULE, x_t, T, x_start), noise),
        (ddpm.predict_xstart_from_v(SCHEDULE, x_t, T, v), x_start),
        (ddpm.predict_eps_from_v(SCHEDULE, x_t, T, v), noise),
    ]:
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_q_sample_has_the_moments_of_q(key):
    """One image noised 20,000 times: mean and variance within 4 standard errors."""
    count = 20_000
    x_start = jnp.broadcast_to(jnp.array([-1.0, 0.2, 1.0]), (count, 3))
    t = np.full(count, 120)
    x_t = ddpm.q_sample(SCHEDULE, x_start, t, jax.random.normal(key, x_start.shape))
    mean, variance, log_variance = ddpm.q_mean_variance(SCHEDULE, x_start, t)
    assert np.all(np.abs(x_t.mean(0) - mean[0]) < 4 * np.sqrt(variance[0] / count))
    assert np.all(np.abs(x_t.var(0) - variance[0]) < 4 * variance[0] * np.sqrt(2 / count))
    np.testing.assert_allclose(jnp.exp(log_variance), variance, rtol=1e-12)


def test_posterior_at_the_first_entry_is_x_start(pair):
    x_start, x_t = pair
    t = np.zeros(4, np.int32)
    mean, variance, _ = ddpm.q_posterior_mean_variance(SCHEDULE, x_start, x_t, t)
    np.testing.assert_allclose(mean, x_start, atol=1e-12)
    assert not np.any(variance)


def test_dtype_follows_the_images(pair):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float64):
        a, b = pair.astype(dtype)
        assert ddpm.q_sample(SCHEDULE, a, T, b).dtype == dtype


def test_a_noise_that_would_broadcast_is_refused(pair, untyped):
    x_start, noise = pair
    with pytest.raises(ValueError, match=r"noise: expected shape \(4, 5, 6, 3\), got \(1, "):
        ddpm.q_sample(SCHEDULE, x_start, T, noise[:1])
