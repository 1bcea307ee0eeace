import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])
PREDICTIONS = ["epsilon", "sample", "v_prediction"]


@pytest.fixture
def pair(key):
    return jax.random.normal(key, (2, 4, 5, 6, 3))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_a_perfect_network_has_no_loss(prediction_type, pair):
    x_start, noise = pair
    target = {
        "epsilon": noise,
        "sample": x_start,
        "v_prediction": ddpm.predict_v(SCHEDULE, x_start, T, noise),
    }[prediction_type]

    def losses(output):
        return ddpm.training_losses(
            SCHEDULE, lambda x, t: output, x_start, T, noise, prediction_type=prediction_type
        )

    np.testing.assert_array_equal(losses(target), np.zeros(4))
    # Off by 1, 2, 3 and 4 everywhere: each sample keeps its own mean square.
    offset = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(losses(target + offset), [1, 4, 9, 16], rtol=1e-12)


def test_network_sees_x_t_and_the_training_timestep(pair):
    x_start, noise = pair
    seen = {}

    def denoise_fn(x, t):
        seen.update(x=x, t=t)
        return x

    short = ddpm.respace(SCHEDULE, [5, 60, 110, 199])
    ddpm.training_losses(short, denoise_fn, x_start, np.arange(4), noise)
    np.testing.assert_array_equal(seen["t"], [5, 60, 110, 199])
    np.testing.assert_allclose(
        seen["x"], ddpm.q_sample(SCHEDULE, x_start, seen["t"], noise), rtol=1e-12
    )


@pytest.mark.parametrize("loss_type", ["mse", "vb", "hybrid"])
def test_jit_vmap_and_no_second_compilation(pair, loss_type):
    x_start, noise = pair

    def losses(x, t, noise):
        return ddpm.training_losses(
            SCHEDULE,
            lambda x, t: jnp.concatenate([jnp.sin(x), jnp.cos(x)], axis=-1),
            x,
            t,
            noise,
            variance_type="learned_range",
            loss_type=loss_type,
        )

    jitted, expected = jax.jit(losses), losses(x_start, T, noise)
    np.testing.assert_allclose(jitted(x_start, T, noise), expected, rtol=1e-12)
    jitted(noise, T, x_start)
    assert jitted._cache_size() == 1
    several = jax.vmap(jitted)(pair, np.stack([T, T]), pair[::-1])
    np.testing.assert_allclose(several[0], expected, rtol=1e-12)


def by_channels(loss_type, pair, **policy):
    """The loss's gradient by the network's output: channels of the mean, of the variance."""
    x_start, noise = pair

    def total(mean, values):
        output = jnp.concatenate([mean, values], axis=-1)
        losses = ddpm.training_losses(
            SCHEDULE, lambda x, t: output, x_start, T, noise, loss_type=loss_type, **policy
        )
        return jnp.sum(losses)

    return jax.grad(total, (0, 1))(jnp.sin(noise), jnp.cos(noise))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_hybrid_trains_the_mean_by_mse_and_the_variance_by_the_bound(
    prediction_type, variance_type, pair
):
    policy = {"prediction_type": prediction_type, "variance_type": variance_type}
    mse, vb, hybrid = (by_channels(name, pair, **policy) for name in ("mse", "vb", "hybrid"))
    np.testing.assert_array_equal(hybrid[0], mse[0])
    np.testing.assert_array_equal(mse[1], jnp.zeros_like(mse[1]))
    np.testing.assert_allclose(hybrid[1], vb[1] * (200 / 1000), rtol=1e-12, atol=1e-18)
    assert np.all(vb[0][1:] != 0)


def test_hybrid_runs_the_network_once(pair):
    calls = []

    def denoise_fn(x, t):
        calls.append(t)
        return jnp.concatenate([x, x], axis=-1)

    policy = {"variance_type": "learned_range", "loss_type": "hybrid", "weighting": "min_snr"}
    ddpm.training_losses(SCHEDULE, denoise_fn, pair[0], T, pair[1], **policy)
    assert len(calls) == 1


def test_bound_of_an_exact_x_start_is_zero_but_at_the_pixels(pair):
    x_start = jnp.round(jnp.tanh(pair[0]) * 127.5) / 127.5
    vb = ddpm.training_losses(
        SCHEDULE,
        lambda x, t: x_start,
        x_start,
        T,
        pair[1],
        prediction_type="sample",
        loss_type="vb",
    )
    np.testing.assert_array_equal(vb[1:], np.zeros(3))
    # What a bin of 2/255 holds about its centre, by the normal CDF.
    deviation = np.exp(SCHEDULE.posterior_log_variance_clipped[0] / 2)
    mass = math.erf(1 / 255 / deviation / math.sqrt(2))
    np.testing.assert_allclose(vb[0], -np.log2(mass), rtol=2e-3)


def min_snr_weights(prediction_type, gamma=5.0):
    """What weighs the squares at every entry, seen through a network that is off by 1."""
    zeros = np.zeros((200, 1))
    losses = ddpm.training_losses(
        SCHEDULE,
        lambda x, t: jnp.ones_like(x),
        zeros,
        np.arange(200),
        zeros,
        prediction_type=prediction_type,
        weighting="min_snr",
        min_snr_gamma=gamma,
    )
    return np.asarray(losses)


def test_min_snr_clamps_where_the_signal_is_strong():
    """The clamp the wrong way round, a bug of other code, gives the clean steps more weight."""
    snr = SCHEDULE.alphas_cumprod / (1 - SCHEDULE.alphas_cumprod)
    strong = snr > 5
    assert 0 < strong.sum() < 200
    eps = min_snr_weights("epsilon")
    np.testing.assert_array_equal(eps[~strong], np.ones((~strong).sum()))
    assert np.all(eps[strong] < 1)
    assert np.all(np.diff(eps) >= 0)  # entries ascend, and the SNR falls
    np.testing.assert_allclose(min_snr_weights("sample")[strong], np.full(strong.sum(), 5.0))
    np.testing.assert_allclose(min_snr_weights("sample")[~strong], snr[~strong], rtol=1e-9)
    # The same error of x_0 costs the same whatever is predicted: ε is √SNR of it, v √(SNR + 1).
    for name, scale in (("epsilon", snr), ("v_prediction", snr + 1)):
        np.testing.assert_allclose(
            min_snr_weights(name) * scale, min_snr_weights("sample"), rtol=1e-9
        )
    np.testing.assert_allclose(min_snr_weights("epsilon", gamma=1e9), np.ones(200))


@pytest.mark.parametrize("loss_type", ["mse", "vb", "hybrid"])
def test_zero_terminal_snr_is_finite_and_so_are_gradients(loss_type, pair):
    schedule = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(SCHEDULE.betas))
    x_start, noise = (x.astype(jnp.float32) for x in pair)

    def total(schedule, scale, x_start):
        losses = ddpm.training_losses(
            schedule,
            lambda x, t: jnp.concatenate([scale * x, scale * jnp.sin(x)], axis=-1),
            x_start,
            T,
            noise,
            prediction_type="v_prediction",
            variance_type="learned_range",
            loss_type=loss_type,
            weighting=None if loss_type == "vb" else "min_snr",
        )
        return jnp.sum(losses), losses

    gradient = jax.jit(jax.grad(total, (1, 2), has_aux=True))
    slopes, losses = gradient(schedule, jnp.float32(0.5), x_start)
    assert losses.dtype == jnp.float32 and np.all(np.isfinite(losses))
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ({"loss_type": "l1"}, "loss_type: expected one of 'mse', .* got 'l1'"),
        ({"weighting": "snr"}, "weighting: expected one of None, 'min_snr', got 'snr'"),
        (
            {"loss_type": "vb", "weighting": "min_snr"},
            "weighting: expected None with loss_type 'vb', got 'min_snr'",
        ),
        ({"loss_type": "hybrid"}, "variance_type .*: expected one of 'learned', .* 'fixed_small'"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma: expected a number above 0, got 0.0"),
    ],
)
def test_bad_policy_is_named(untyped, pair, policy, words):
    with pytest.raises(ValueError, match=words):
        ddpm.training_losses(SCHEDULE, lambda x, t: x, pair[0], T, pair[1], **policy)
