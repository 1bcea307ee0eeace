from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
X_START, NOISE = np.random.default_rng(0).standard_normal((2, 4, 5, 6, 3))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_network_has_no_loss(prediction_type):
    v = ddpm.predict_v(SCHEDULE, X_START, T, NOISE)
    target = jnp.asarray({"epsilon": NOISE, "sample": X_START, "v_prediction": v}[prediction_type])

    def losses(output):
        policy = {"prediction_type": prediction_type}
        return ddpm.training_losses(SCHEDULE, lambda x, t: output, X_START, T, NOISE, **policy)

    np.testing.assert_array_equal(losses(target), np.zeros(4))
    # Off by 1, 2, 3 and 4 everywhere: each sample keeps its own mean square.
    offset = np.arange(1.0, 5.0).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(losses(target + offset), [1, 4, 9, 16], rtol=1e-12)


def test_network_sees_x_t_and_the_training_timestep():
    seen = {}

    def denoise_fn(x, t):
        seen.update(x=x, t=t)
        return x

    short = ddpm.respace(SCHEDULE, [5, 60, 110, 199])
    ddpm.training_losses(short, denoise_fn, X_START, np.arange(4), NOISE)
    np.testing.assert_array_equal(seen["t"], [5, 60, 110, 199])
    x_t = ddpm.q_sample(SCHEDULE, X_START, np.array([5, 60, 110, 199]), NOISE)
    np.testing.assert_allclose(seen["x"], x_t, rtol=1e-12)


def test_jit_vmap_no_second_trace_and_one_run_of_the_network():
    """L_hybrid is L_simple + T/1000 · L_vb (Nichol & Dhariwal 2021, eq. 16)."""
    traces = []

    def denoise_fn(x, t):
        traces.append(t)
        return jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1)

    def every(*batch):
        losses = partial(ddpm.training_losses, SCHEDULE, denoise_fn, *batch)
        kinds = ("mse", "vb", "hybrid")
        return {kind: losses(variance_type="learned_range", loss_type=kind) for kind in kinds}

    expected = every(X_START, T, NOISE)
    assert len(traces) == 3
    np.testing.assert_allclose(expected["hybrid"], expected["mse"] + 0.2 * expected["vb"])
    jitted = jax.jit(every)
    got = jitted(X_START, T, NOISE)
    jitted(NOISE, T, X_START)
    assert len(traces) == 6
    pair = np.stack([X_START, NOISE])
    several = jax.jit(jax.vmap(every))(pair, np.stack([T, T]), pair[::-1])
    for name, value in expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-12)
        np.testing.assert_allclose(several[name][0], value, rtol=1e-12)


@pytest.mark.parametrize(
    ("prediction_type", "variance_type"),
    [*((name, "learned_range") for name in PREDICTIONS), ("epsilon", "learned")],
)
def test_hybrid_trains_the_mean_by_mse_and_the_variance_by_the_bound(
    prediction_type, variance_type
):
    """L_simple alone has no gradient by the variance's channels, so hybrid is the default."""
    policy = {"prediction_type": prediction_type, "variance_type": variance_type}

    @jax.jit
    def by_channels(mean, values):
        def total(mean, values, loss_type):
            network = lambda x, t: jnp.concatenate([mean, values], axis=-1)
            batch = (X_START, T, NOISE)
            return ddpm.training_losses(
                SCHEDULE, network, *batch, loss_type=loss_type, **policy
            ).sum()

        kinds = ("mse", "vb", "hybrid", None)
        return [jax.grad(total, (0, 1))(mean, values, loss_type) for loss_type in kinds]

    mse, vb, hybrid, default = by_channels(np.sin(NOISE), np.cos(NOISE))
    np.testing.assert_array_equal(hybrid[0], mse[0])
    np.testing.assert_array_equal(mse[1], np.zeros_like(mse[1]))
    np.testing.assert_allclose(hybrid[1], vb[1] * (200 / 1000), rtol=1e-12, atol=1e-18)
    np.testing.assert_array_equal(default, hybrid)
    assert np.all(vb[0][1:] != 0) and np.any(hybrid[1])


def min_snr_weights(schedule, prediction_type, gamma=5.0):
    """What weighs the squares at every entry, seen through a network that is off by 1."""
    entries = np.arange(schedule.num_timesteps)
    zeros = np.zeros((entries.size, 1))
    policy = {"prediction_type": prediction_type, "weighting": "min_snr", "min_snr_gamma": gamma}
    network = lambda x, t: jnp.ones_like(x)
    return np.asarray(ddpm.training_losses(schedule, network, zeros, entries, zeros, **policy))


def test_min_snr_weighs_an_error_of_x_start_alike_whatever_is_predicted():
    """ε is √SNR of it, and v √(SNR + 1): Hang et al. 2023, §3.4, with γ = 5.

    The clamp the wrong way round, max(SNR, γ), made the easiest steps count most.
    """
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    eps, sample, v = (min_snr_weights(SCHEDULE, name) for name in PREDICTIONS)
    np.testing.assert_allclose(sample, np.where(snr > 5, 5, snr), rtol=1e-9)
    np.testing.assert_allclose(eps * snr, sample, rtol=1e-9)
    np.testing.assert_allclose(v * (snr + 1), sample, rtol=1e-9)
    np.testing.assert_allclose(min_snr_weights(SCHEDULE, "epsilon", gamma=1e9), np.ones(200))


@pytest.mark.parametrize("loss_type", ["mse", "vb", "hybrid"])
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


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"loss_type": "vb", "weighting": "min_snr"}, "weighting: expected None"),
        ({"loss_type": "hybrid"}, "loss_type: 'hybrid' comes with a learned variance_type"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: expected more than 0"),
    ],
)
def test_choices_that_do_not_fit_are_named(untyped, policy, words):
    with pytest.raises(ValueError, match="^" + words):
        ddpm.training_losses(SCHEDULE, lambda x, t: x, X_START, T, NOISE, **policy)
