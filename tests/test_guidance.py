from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (4, 3, 3, 2)


def best_output(mean, std, prediction_type="epsilon"):
    """E[ε | x_t], E[x_0 | x_t] or E[v | x_t] for data N(mean, std²)."""

    def denoise_fn(x, t):
        a = jnp.asarray(SCHEDULE.alphas_cumprod)[t].reshape(-1, *((1,) * (x.ndim - 1)))
        residual = (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)
        eps, x_start = jnp.sqrt(1 - a) * residual, mean + jnp.sqrt(a) * std**2 * residual
        v = jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x_start
        return {"epsilon": eps, "sample": x_start, "v_prediction": v}[prediction_type]

    return denoise_fn


CONDITIONAL, UNCONDITIONAL = best_output(0.8, 0.3), best_output(0.1, 0.9)


@pytest.fixture
def x_t(key):
    return jax.random.normal(key, SHAPE)


@pytest.fixture
def t():
    return jnp.array([0, 49, 50, 199], jnp.int32)


def test_scale_runs_from_unconditional_to_conditional_and_on(x_t, t):
    c, u = CONDITIONAL(x_t, t), UNCONDITIONAL(x_t, t)
    for scale in (0.0, 0.5, 1.0, 7.5, -1.0):
        guided = ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, scale)(x_t, t)
        np.testing.assert_allclose(guided, u + scale * (c - u), rtol=1e-13, atol=1e-13)
    guided = ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, 1.0)(x_t, t)
    np.testing.assert_array_equal(guided, c)


def test_scale_may_differ_by_sample(x_t, t):
    scales = jnp.array([0.0, 1.0, 3.0, 7.5])
    together = ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, scales)(x_t, t)
    for j, scale in enumerate(scales):
        alone = ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, float(scale))(x_t, t)
        np.testing.assert_array_equal(together[j], alone[j])


@pytest.mark.parametrize("rescale", [0.3, 0.7, 1.0])
def test_rescale_is_that_of_diffusers(torch, diffusers, x_t, t, rescale):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    guide = partial(ddpm.classifier_free_guidance, CONDITIONAL, UNCONDITIONAL, 7.5)
    plain, rescaled = guide()(x_t, t), guide(rescale=rescale)(x_t, t)
    expected = rescale_noise_cfg(
        torch.from_numpy(np.array(plain)),
        torch.from_numpy(np.array(CONDITIONAL(x_t, t))),
        guidance_rescale=rescale,
    )
    np.testing.assert_allclose(rescaled, expected.numpy(), rtol=1e-12, atol=1e-12)


def test_interval_includes_both_ends(x_t):
    plain = ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, 3.0)
    within = ddpm.classifier_free_guidance(
        CONDITIONAL, UNCONDITIONAL, 3.0, interval=(50, 100), rescale=0.0
    )
    for times, expected in ([[50, 51, 99, 100], plain], [[0, 49, 101, 199], CONDITIONAL]):
        t = jnp.array(times, jnp.int32)
        np.testing.assert_array_equal(within(x_t, t), expected(x_t, t))
    rescaled = ddpm.classifier_free_guidance(
        CONDITIONAL, UNCONDITIONAL, 3.0, interval=(50, 100), rescale=0.7
    )
    np.testing.assert_allclose(rescaled(x_t, t), CONDITIONAL(x_t, t), rtol=1e-14)


def with_variance(denoise_fn, value):
    return lambda x, t: jnp.concatenate([denoise_fn(x, t), jnp.full_like(x, value)], axis=-1)


def test_a_learned_variance_is_the_conditional_one(x_t, t):
    learned = ddpm.classifier_free_guidance(
        with_variance(CONDITIONAL, 0.25), with_variance(UNCONDITIONAL, -1.0), 3.0, rescale=0.5
    )(x_t, t)
    plain = ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, 3.0, rescale=0.5)(x_t, t)
    np.testing.assert_allclose(learned[..., :2], plain, rtol=1e-14)
    np.testing.assert_array_equal(learned[..., 2:], np.full(SHAPE, 0.25))
    led = ddpm.classifier_guidance(
        SCHEDULE, with_variance(CONDITIONAL, 0.25), lambda x, t: -x.sum((1, 2, 3))
    )(x_t, t)
    np.testing.assert_array_equal(led[..., 2:], np.full(SHAPE, 0.25))


def test_another_scale_compiles_nothing_in_the_whole_chain(key):
    @jax.jit
    def draw(scale):
        guided = ddpm.classifier_free_guidance(
            CONDITIONAL, UNCONDITIONAL, scale, interval=(20, 150), rescale=0.7
        )
        return ddpm.p_sample_loop(key, SHORT, guided, SHAPE)

    one, three = draw(1.0), draw(3.0)
    assert draw._cache_size() == 1 and np.all(np.isfinite(three))
    conditional = jax.jit(lambda key: ddpm.p_sample_loop(key, SHORT, CONDITIONAL, SHAPE))(key)
    np.testing.assert_allclose(one, conditional, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_guided_samples_stay_on_their_devices(key, axis_type):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("data"))

    def draw(key, sharding):
        guided = ddpm.classifier_free_guidance(
            CONDITIONAL, UNCONDITIONAL, 3.0, interval=(20, 150), rescale=0.7
        )
        guided = ddpm.classifier_guidance(SCHEDULE, guided, lambda x, t: -(x**2).sum((1, 2, 3)))
        return ddpm.p_sample_loop(key, SHORT, guided, (16, 3, 3, 2), sharding=sharding)

    spread = jax.jit(partial(draw, sharding=sharding))
    alone = jax.jit(partial(draw, sharding=None))(key)
    np.testing.assert_allclose(spread(key), alone, rtol=1e-10, atol=1e-10)
    text = spread.lower(key).compile().as_text()
    for collective in ("all-gather", "all-reduce", "collective-permute", "all-to-all"):
        assert collective not in text


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_classifier_guidance_gives_the_posterior(prediction_type, x_t, t):
    """Data N(m, s²), a label y = x_0 + N(0, r²): the exact classifier leads to the exact answer.

    p(y | x_t) is Gaussian about E[x_0 | x_t] with the variance of x_0 given x_t plus r², and
    the best output of the guided network is that for data of the posterior N(m', s'²).
    """
    mean, std, y, noise = 0.3, 0.7, 1.1, 0.4
    posterior_std = (1 / std**2 + 1 / noise**2) ** -0.5
    posterior_mean = posterior_std**2 * (mean / std**2 + y / noise**2)

    def log_prob_fn(x, t):
        a = jnp.asarray(SCHEDULE.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
        expected = best_output(mean, std, "sample")(x, t)
        variance = std**2 * (1 - a) / (a * std**2 + 1 - a) + noise**2
        return (-((y - expected) ** 2) / variance / 2 - jnp.log(variance) / 2).sum((1, 2, 3))

    guided = ddpm.classifier_guidance(
        SCHEDULE,
        best_output(mean, std, prediction_type),
        log_prob_fn,
        prediction_type=prediction_type,
    )
    expected = best_output(posterior_mean, posterior_std, prediction_type)(x_t, t)
    np.testing.assert_allclose(guided(x_t, t), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_reconstruction_guidance_gives_the_posterior(prediction_type, x_t, t):
    """As above, for a measurement y of x_0 whose variance about x̂_0 is known at every step."""
    mean, std, y, noise = 0.3, 0.7, 1.1, 0.4
    posterior_std = (1 / std**2 + 1 / noise**2) ** -0.5
    posterior_mean = posterior_std**2 * (mean / std**2 + y / noise**2)

    def log_prob_fn(x_start, t):
        a = jnp.asarray(SCHEDULE.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
        variance = std**2 * (1 - a) / (a * std**2 + 1 - a) + noise**2
        return (-((y - x_start) ** 2) / variance / 2).sum((1, 2, 3))

    guided = ddpm.reconstruction_guidance(
        SCHEDULE,
        with_variance(best_output(mean, std, prediction_type), 0.25),
        log_prob_fn,
        prediction_type=prediction_type,
        clip_denoised=False,
    )(x_t, t)
    expected = best_output(posterior_mean, posterior_std, prediction_type)(x_t, t)
    np.testing.assert_allclose(guided[..., :2], expected, rtol=0, atol=1e-10)
    np.testing.assert_array_equal(guided[..., 2:], np.full(SHAPE, 0.25))


def test_reconstruction_guidance_sees_what_is_clipped(x_t, t):
    """Where x̂_0 is clipped its gradient is 0, and where it is not, nothing changes."""
    free, led = (
        ddpm.reconstruction_guidance(
            SCHEDULE, CONDITIONAL, lambda x, t: x.sum((1, 2, 3)), clip_denoised=clip
        )(x_t, t)
        for clip in (False, lambda x: jnp.clip(x, 0.7, 0.8))
    )
    x_start = best_output(0.8, 0.3, "sample")(x_t, t)
    outside = (x_start < 0.7) | (x_start > 0.8)
    assert 0 < outside.mean() < 1
    expected = jnp.where(outside, CONDITIONAL(x_t, t), free)
    np.testing.assert_allclose(led, expected, rtol=1e-12, atol=1e-14)


def test_pure_noise_is_not_led(x_t):
    """At ᾱ = 0 the shift of v would be 0 / 0."""
    schedule = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(SCHEDULE.betas))
    guided = ddpm.classifier_guidance(
        schedule,
        CONDITIONAL,
        lambda x, t: -(x**2).sum((1, 2, 3)),
        jnp.array([1.0, 2.0, 3.0, 4.0]),
        prediction_type="v_prediction",
    )
    t = jnp.full((4,), 199, jnp.int32)
    np.testing.assert_array_equal(guided(x_t, t), CONDITIONAL(x_t, t))


def test_bad_input_is_named(untyped, x_t, t):
    guide = partial(ddpm.classifier_free_guidance, CONDITIONAL, UNCONDITIONAL)
    with pytest.raises(ValueError, match="rescale: expected 0 to 1, got 2"):
        guide(3.0, rescale=2.0)
    with pytest.raises(ValueError, match=r"interval: expected \(low, high\) .*, got \(9, 3\)"):
        guide(3.0, interval=(9, 3))
    with pytest.raises(ValueError, match=r"scale: expected shape \(4,\) or \(\), got \(3,\)"):
        guide(jnp.ones(3))(x_t, t)
    with pytest.raises(ValueError, match="output of unconditional: expected shape"):
        ddpm.classifier_free_guidance(CONDITIONAL, lambda x, t: x[:1], 3.0)(x_t, t)
    with pytest.raises(ValueError, match="output of log_prob_fn: expected shape"):
        ddpm.classifier_guidance(SCHEDULE, CONDITIONAL, lambda x, t: x.sum())(x_t, t)
    with pytest.raises(ValueError, match="schedule: expected the training schedule"):
        ddpm.classifier_guidance(SHORT, CONDITIONAL, lambda x, t: x.sum((1, 2, 3)))
    with pytest.raises(ValueError, match="prediction_type: expected one of"):
        ddpm.classifier_guidance(SCHEDULE, CONDITIONAL, lambda x, t: t, prediction_type="noise")
    with pytest.raises(ValueError, match="output of log_prob_fn: expected shape"):
        ddpm.reconstruction_guidance(SCHEDULE, CONDITIONAL, lambda x, t: x.sum())(x_t, t)
    with pytest.raises(ValueError, match="schedule: expected the training schedule"):
        ddpm.reconstruction_guidance(SHORT, CONDITIONAL, lambda x, t: x.sum((1, 2, 3)))
