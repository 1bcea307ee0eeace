import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))


@pytest.fixture
def x_t(key):
    return jax.random.normal(key, (3, 4, 4, 2))


def test_network_sees_int32_training_timesteps(x_t):
    seen = []

    def denoise_fn(x, t):
        seen.append(t)
        return x

    short = ddpm.respace(SCHEDULE, [0, 50, 199])
    ddpm.p_mean_variance(short, denoise_fn, x_t, np.array([0, 1, 2]))
    ddpm.p_mean_variance(short, denoise_fn, x_t, np.int64(2))
    np.testing.assert_array_equal(seen, [[0, 50, 199], [199, 199, 199]])
    assert all(t.dtype == jnp.int32 for t in seen)


def test_learned_variance_is_the_second_half_of_the_channels(x_t):
    """NumPy's `split(x, C)` makes C pieces; torch's splits at C."""

    def denoise_fn(x, t):
        return jnp.concatenate([x, jnp.full_like(x, -3.0)], axis=-1)

    p = ddpm.p_mean_variance(SCHEDULE, denoise_fn, x_t, 7, variance_type="learned")
    np.testing.assert_array_equal(p.log_variance, np.full(x_t.shape, -3.0))
    np.testing.assert_allclose(p.variance, np.full(x_t.shape, np.exp(-3.0)))


@pytest.mark.parametrize(("value", "table"), [(1.0, "log_betas"), (-1.0, "posterior")])
def test_learned_range_interpolates_logarithms(x_t, value, table):
    def denoise_fn(x, t):
        return jnp.concatenate([x, jnp.full_like(x, value)], axis=-1)

    p = ddpm.p_mean_variance(SCHEDULE, denoise_fn, x_t, 7, variance_type="learned_range")
    name = "posterior_log_variance_clipped" if table == "posterior" else table
    np.testing.assert_allclose(p.log_variance, np.full(x_t.shape, getattr(SCHEDULE, name)[7]))


def test_clipping_bounds_x_start(x_t):
    p = ddpm.p_mean_variance(SCHEDULE, lambda x, t: 3 * x, x_t, 150)
    assert float(jnp.abs(p.pred_xstart).max()) == 1
    free = ddpm.p_mean_variance(SCHEDULE, lambda x, t: 3 * x, x_t, 150, clip_denoised=False)
    assert float(jnp.abs(free.pred_xstart).max()) > 1


def test_output_takes_the_dtype_of_x(x_t):
    p = ddpm.p_mean_variance(SCHEDULE, lambda x, t: x.astype(jnp.bfloat16), x_t, 3)
    assert all(value.dtype == x_t.dtype for value in p)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"prediction_type": "eps"}, "prediction_type: expected one of 'epsilon', .* got 'eps'"),
        ({"variance_type": "small"}, "variance_type: expected one of .* got 'small'"),
        ({"variance_type": "learned"}, r"denoise_fn: expected shape \(3, 4, 4, 4\)"),
    ],
)
def test_bad_policy_is_named(untyped, x_t, policy, words):
    with pytest.raises(ValueError, match=words):
        ddpm.p_mean_variance(SCHEDULE, lambda x, t: x, x_t, 3, **policy)
