from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHAPE = (3, 4, 4, 2)
X_T = np.random.default_rng(0).standard_normal(SHAPE)


def test_network_sees_int32_training_timesteps():
    seen = []

    def denoise_fn(x, t):
        seen.append(t)
        return x

    short = ddpm.respace(SCHEDULE, [0, 50, 199])
    ddpm.p_mean_variance(short, denoise_fn, X_T, np.array([0, 1, 2]))
    ddpm.p_mean_variance(short, denoise_fn, X_T, np.int64(2))
    np.testing.assert_array_equal(seen, [[0, 50, 199], [199, 199, 199]])
    assert all(t.dtype == jnp.int32 for t in seen)


def learned(value):
    """A network that halves x and says `value` for the variance of every pixel."""
    return lambda x, t: jnp.concatenate([x / 2, jnp.full_like(x, value)], axis=-1)


def test_learned_variance_is_the_second_half_of_the_channels():
    """`jnp.split(x, C)` makes C pieces, as NumPy's; torch's makes pieces of C channels."""
    policy = {"prediction_type": "sample", "variance_type": "learned", "clip_denoised": False}
    p = ddpm.p_mean_variance(SCHEDULE, learned(-3.0), X_T, 100, **policy)
    np.testing.assert_array_equal(p.pred_xstart, X_T / 2)
    np.testing.assert_array_equal(p.log_variance, np.full(SHAPE, -3.0))


BETAS, POSTERIOR = SCHEDULE.betas, SCHEDULE.posterior_variance


@pytest.mark.parametrize(
    ("variance_type", "value", "variance"),
    [
        ("fixed_small", None, POSTERIOR[[0, 1, 100]]),
        ("fixed_large", None, [POSTERIOR[1], BETAS[1], BETAS[100]]),
        ("learned", -3.0, np.exp([-3.0, -3.0, -3.0])),
        ("learned_range", 1.0, BETAS[[0, 1, 100]]),
        ("learned_range", -1.0, POSTERIOR[[1, 1, 100]]),
        # Half way lies √(β β̃), not (β + β̃) / 2: logarithms are mixed.
        ("learned_range", 0.0, np.sqrt(BETAS[[0, 1, 100]] * POSTERIOR[[1, 1, 100]])),
    ],
)
def test_the_variance_and_the_noise_that_it_scales(variance_type, value, variance):
    """A log-variance taken for a variance is negative, and the root of that NaN."""
    network = (lambda x, t: x / 2) if value is None else learned(value)
    policy = {"variance_type": variance_type}

    @jax.jit
    def step(t, noise):
        p = ddpm.p_mean_variance(SCHEDULE, network, X_T, t, **policy)
        run = partial(ddpm.p_sample_steps, None, SCHEDULE, network, noise_fn=lambda i: noise)
        return p, run(ddpm.SampleState(t[2], X_T, ()), 1, **policy).x_t

    (p, quiet), (_, loud) = (step(np.array([0, 1, 100]), np.full(SHAPE, s)) for s in (0.0, 1.0))
    for sample, expected in enumerate(variance):
        np.testing.assert_allclose(p.variance[sample], np.full(SHAPE[1:], expected), rtol=1e-9)
    np.testing.assert_allclose(p.log_variance[1:], np.log(p.variance[1:]), rtol=1e-9)
    np.testing.assert_allclose(loud - quiet, np.full(SHAPE, np.sqrt(variance[2])), rtol=1e-9)


def test_clipping_bounds_x_start():
    step = partial(ddpm.p_mean_variance, SCHEDULE, lambda x, t: 3 * x, X_T, 150)
    assert np.abs(step().pred_xstart).max() == 1
    assert np.abs(step(clip_denoised=False).pred_xstart).max() > 1


def test_output_takes_the_dtype_of_x():
    network = lambda x, t: x.astype(jnp.bfloat16)
    p = jax.eval_shape(lambda x: ddpm.p_mean_variance(SCHEDULE, network, x, 3), X_T)
    assert all(value.dtype == X_T.dtype for value in p)


def test_what_the_output_cannot_mean_is_named(untyped):
    step = partial(ddpm.p_mean_variance, denoise_fn=lambda x, t: x, x_t=X_T, t=3)
    with pytest.raises(ValueError, match=r"^output of denoise_fn: expected shape \(3, 4, 4, 4\)"):
        step(SCHEDULE, variance_type="learned")
    # At zero terminal SNR x_t is ε, and says nothing of x_0.
    schedule = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(BETAS))
    with pytest.raises(ValueError, match="^prediction_type: expected 'sample' or 'v_prediction'"):
        step(schedule)
