import jax
import numpy as np

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])
PREDICT = [value for name, value in vars(ddpm).items() if name.startswith("predict_")]
X_START, NOISE = np.random.default_rng(0).standard_normal((2, 4, 5, 6, 3))


def test_jit_vmap_and_batch():
    traces = []

    def every(schedule, a, t, b):
        traces.append(t)
        return {
            function.__name__: function(schedule, a, t, b) for function in [ddpm.q_sample, *PREDICT]
        }

    expected = every(SCHEDULE, X_START, T, NOISE)
    jitted, vmapped = jax.jit(every), jax.jit(jax.vmap(every, in_axes=(None, 0, 0, 0)))
    whole, each = (run(SCHEDULE, X_START, T, NOISE) for run in (jitted, vmapped))
    before = len(traces)
    jitted(SCHEDULE, NOISE, T, X_START)
    assert len(traces) == before
    alone = every(SCHEDULE, X_START[2:3], T[2:3], NOISE[2:3])
    for name, value in expected.items():
        assert value.shape == X_START.shape
        np.testing.assert_allclose(whole[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(each[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
        np.testing.assert_array_equal(alone[name], value[2:3], err_msg=name)


def test_conversions_return_what_made_x_t():
    x_t = ddpm.q_sample(SCHEDULE, X_START, T, NOISE)
    v = ddpm.predict_v(SCHEDULE, X_START, T, NOISE)
    for got, expected in [
        (ddpm.predict_xstart_from_eps(SCHEDULE, x_t, T, NOISE), X_START),
        (ddpm.predict_eps_from_xstart(SCHEDULE, x_t, T, X_START), NOISE),
        (ddpm.predict_xstart_from_v(SCHEDULE, x_t, T, v), X_START),
        (ddpm.predict_eps_from_v(SCHEDULE, x_t, T, v), NOISE),
    ]:
        np.testing.assert_allclose(got, expected, atol=1e-12)


def test_q_sample_has_the_moments_of_q():
    """One image noised 20,000 times: mean and variance within 4 standard errors."""
    count = 20_000
    x_start = np.tile([-1.0, 0.2, 1.0], (count, 1))
    t = np.full(count, 120)
    noise = np.random.default_rng(0).standard_normal(x_start.shape)
    x_t = np.asarray(ddpm.q_sample(SCHEDULE, x_start, t, noise))
    moments = ddpm.q_mean_variance(SCHEDULE, x_start, t)
    mean, variance, log_variance = (np.asarray(each)[0] for each in moments)
    assert np.all(np.abs(x_t.mean(0) - mean) < 4 * np.sqrt(variance / count))
    assert np.all(np.abs(x_t.var(0) - variance) < 4 * variance * np.sqrt(2 / count))
    np.testing.assert_allclose(np.exp(log_variance), variance, rtol=1e-12)
