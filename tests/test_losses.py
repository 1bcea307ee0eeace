from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])
KINDS = ("mse", "vb", "hybrid")
X_START, NOISE = np.random.default_rng(0).standard_normal((2, 4, 5, 6, 3))


def test_jit_vmap_no_second_trace_and_one_run_of_the_network():
    """L_hybrid is L_simple + T/1000 · L_vb (Nichol & Dhariwal 2021, eq. 16), and the default for a
    learned variance, which L_simple alone leaves untrained."""
    traces = []

    def denoise_fn(x, t):
        traces.append(t)
        return jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1)

    def every(*batch):
        losses = partial(ddpm.training_losses, SCHEDULE, denoise_fn, *batch)
        losses = partial(losses, variance_type="learned_range")
        return {"default": losses(), **{kind: losses(loss_type=kind) for kind in KINDS}}

    expected = every(X_START, T, NOISE)
    assert len(traces) == 4
    np.testing.assert_array_equal(expected["default"], expected["hybrid"])
    np.testing.assert_allclose(expected["hybrid"], expected["mse"] + 0.2 * expected["vb"])
    jitted = jax.jit(every)
    got = jitted(X_START, T, NOISE)
    jitted(NOISE, T, X_START)
    assert len(traces) == 8
    pair = np.stack([X_START, NOISE])
    several = jax.jit(jax.vmap(every))(pair, np.stack([T, T]), pair[::-1])
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12)
        np.testing.assert_allclose(several[name][0], value, rtol=1e-12)


def test_min_snr_with_a_gamma_above_every_snr_changes_nothing():
    losses = partial(ddpm.training_losses, SCHEDULE, lambda x, t: x, X_START, T, NOISE)
    np.testing.assert_allclose(losses(weighting="min_snr", min_snr_gamma=1e9), losses())


@pytest.mark.parametrize("loss_type", KINDS)
def test_zero_terminal_snr_is_finite_and_so_are_gradients(loss_type):
    schedule = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(SCHEDULE.betas))
    x_start, noise = X_START.astype(np.float32), NOISE.astype(np.float32)
    policy = {"prediction_type": "v_prediction", "variance_type": "learned_range"}
    policy |= {"loss_type": loss_type, "weighting": None if loss_type == "vb" else "min_snr"}

    def total(schedule, scale, x_start):
        network = lambda x, t: jnp.concatenate([scale * x, scale * jnp.sin(x)], axis=-1)
        losses = ddpm.training_losses(schedule, network, x_start, T, noise, **policy)
        return jnp.sum(losses), losses

    gradient = jax.jit(jax.grad(total, (1, 2), has_aux=True))
    slopes, losses = gradient(schedule, jnp.float32(0.5), x_start)
    assert losses.dtype == jnp.float32 and np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(slope)) for slope in slopes)
