from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHAPE = (4, 3, 3, 2)
X_T = np.random.default_rng(0).normal(size=SHAPE)
T = np.array([0, 49, 50, 199], np.int32)
exact = partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13)


def best_output(mean, std, prediction_type="epsilon"):
    """E[ε | x_t], E[x_0 | x_t] or E[v | x_t] for data N(mean, std²)."""

    def denoise_fn(x, t):
        a = jnp.asarray(SCHEDULE.alphas_cumprod)[t].reshape(-1, *((1,) * (x.ndim - 1)))
        residual = (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)
        eps, x_start = jnp.sqrt(1 - a) * residual, mean + jnp.sqrt(a) * std**2 * residual
        v = jnp.sqrt(a) * eps - jnp.sqrt(1 - a) * x_start
        return {"epsilon": eps, "sample": x_start, "v_prediction": v}[prediction_type]

    return denoise_fn


CONDITIONAL, UNCONDITIONAL = jax.jit(best_output(0.8, 0.3)), jax.jit(best_output(0.1, 0.9))


@partial(jax.jit, static_argnames=("interval", "rescale"))
def guide(scale, t=T, **policy):
    return ddpm.classifier_free_guidance(CONDITIONAL, UNCONDITIONAL, scale, **policy)(
        jnp.asarray(X_T), t
    )


def with_variance(denoise_fn, value):
    return lambda x, t: jnp.concatenate([denoise_fn(x, t), jnp.full_like(x, value)], axis=-1)


def test_scale_runs_from_unconditional_to_conditional_and_on(no_new_program):
    """One for all samples, or one for each; another one compiles nothing."""
    c, u = np.asarray(CONDITIONAL(X_T, T)), np.asarray(UNCONDITIONAL(X_T, T))
    for scale in (0.0, 7.5, -1.0, np.array([0.0, 0.5, 3.0, 7.5])):
        exact(guide(scale), u + np.reshape(scale, (-1, 1, 1, 1)) * (c - u))
    with no_new_program():
        np.testing.assert_array_equal(guide(1.0), c)


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_is_that_of_diffusers(torch, diffusers, rescale):
    from diffusers.guiders.guider_utils import rescale_noise_cfg

    plain, conditional = (np.array(x) for x in (guide(7.5), CONDITIONAL(X_T, T)))
    tensors = torch.from_numpy(plain), torch.from_numpy(conditional)
    expected = rescale_noise_cfg(*tensors, guidance_rescale=rescale)
    exact(guide(7.5, rescale=rescale), expected.numpy())


def test_interval_includes_both_ends_and_outside_only_the_conditional_network_runs():
    inside, outside = np.array([[50, 51, 99, 100], [0, 49, 101, 199]], np.int32)
    within = partial(guide, 3.0, interval=(50, 100))
    np.testing.assert_array_equal(within(inside), guide(3.0, inside))
    np.testing.assert_array_equal(within(outside), CONDITIONAL(X_T, outside))
    exact(within(outside, rescale=0.3), CONDITIONAL(X_T, outside))  # nor rescaled
    ran = []

    def unconditional(x, t):
        jax.debug.callback(lambda: ran.append(1))
        return x

    guided = ddpm.classifier_free_guidance(CONDITIONAL, unconditional, 3.0, interval=(50, 100))
    for t, expected in (outside, 0), (T, 1), (outside, 1):
        guided(jnp.asarray(X_T), t)
        jax.effects_barrier()
        assert len(ran) == expected


def test_a_learned_variance_is_the_conditional_one():
    networks = with_variance(CONDITIONAL, 0.25), with_variance(UNCONDITIONAL, -1.0)
    guided = jax.jit(ddpm.classifier_free_guidance(*networks, 3.0, rescale=0.3))(X_T, T)
    exact(guided[..., :2], guide(3.0, rescale=0.3))
    np.testing.assert_array_equal(guided[..., 2:], np.full(SHAPE, 0.25))


# Data N(m, s²) and a label, or a measurement, y = x_0 + N(0, r²): the posterior is N(m', s'²).
MEAN, STD, Y, NOISE = 0.3, 0.7, 1.1, 0.4
POSTERIOR_STD = (1 / STD**2 + 1 / NOISE**2) ** -0.5
POSTERIOR_MEAN = POSTERIOR_STD**2 * (MEAN / STD**2 + Y / NOISE**2)


def log_prob_of_y(x_start, t):
    """log p(y | x_t), by x̂_0 = E[x_0 | x_t] and the variance of x_0 given x_t plus r²."""
    a = jnp.asarray(SCHEDULE.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    variance = STD**2 * (1 - a) / (a * STD**2 + 1 - a) + NOISE**2
    return (-((Y - x_start) ** 2) / variance / 2).sum((1, 2, 3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_guidance_gives_the_posterior(prediction_type):
    """The exact classifier, and the exact variance about x̂_0, lead to the exact answer: the best
    output of a network for data of the posterior."""
    network = with_variance(best_output(MEAN, STD, prediction_type), 0.25)

    def classifier(x, t):
        return log_prob_of_y(best_output(MEAN, STD, "sample")(x, t), t)

    @jax.jit
    def outputs(x_t, t):
        policy = dict(prediction_type=prediction_type)
        led = ddpm.classifier_guidance(SCHEDULE, network, classifier, **policy)
        policy |= dict(clip_denoised=False)
        rebuilt = ddpm.reconstruction_guidance(SCHEDULE, network, log_prob_of_y, **policy)
        expected = best_output(POSTERIOR_MEAN, POSTERIOR_STD, prediction_type)
        return led(x_t, t), rebuilt(x_t, t), with_variance(expected, 0.25)(x_t, t)

    led, rebuilt, expected = outputs(X_T, T)
    np.testing.assert_allclose(led, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(rebuilt, expected, rtol=0, atol=1e-10)


def test_reconstruction_guidance_sees_what_is_clipped():
    """Where x̂_0 is clipped its gradient is 0, and where it is not, nothing changes."""

    def lead(clip):
        log_prob, policy = (lambda x, t: x.sum((1, 2, 3))), dict(clip_denoised=clip)
        guided = ddpm.reconstruction_guidance(SCHEDULE, CONDITIONAL, log_prob, **policy)
        return jax.jit(guided)(X_T, T)

    x_start = np.asarray(jax.jit(best_output(0.8, 0.3, "sample"))(X_T, T))
    outside = (x_start < 0.7) | (x_start > 0.8)
    assert 0 < outside.mean() < 1
    expected = np.where(outside, CONDITIONAL(X_T, T), lead(False))
    exact(lead(lambda x: jnp.clip(x, 0.7, 0.8)), expected)


def test_pure_noise_is_not_led():
    """At ᾱ = 0 the shift of v would be 0 / 0."""
    schedule = ddpm.make_schedule(ddpm.rescale_zero_terminal_snr(SCHEDULE.betas))
    log_prob, scales = (lambda x, t: -(x**2).sum((1, 2, 3))), np.array([1.0, 2.0, 3.0, 4.0])
    policy = dict(prediction_type="v_prediction")
    guided = ddpm.classifier_guidance(schedule, CONDITIONAL, log_prob, scales, **policy)
    t = np.full(4, 199, np.int32)
    np.testing.assert_array_equal(jax.jit(guided)(X_T, t), CONDITIONAL(X_T, t))
