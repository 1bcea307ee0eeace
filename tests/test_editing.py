from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (8, 2, 2, 3)
X_START = np.tanh(np.random.default_rng(0).normal(size=SHAPE))


def test_image_to_image_is_the_last_part_of_a_chain(key, network):
    """The same as running the whole chain's last 4 steps from q_sample's x_t, also of one sample
    alone, with draws handed in, with a traced schedule; and where the chain ends in noise."""
    kept, end = SHORT.timesteps, SCHEDULE.alphas_cumprod[5]
    chain = ddpm.respace(SCHEDULE, kept, final_alpha_cumprod=end)
    sampler, noise_fn = ddpm.ddim(eta=0.5), lambda i: ddpm.sample_noise(key, i, SHAPE)

    @jax.jit
    def last_part():
        x_t = ddpm.q_sample(chain, X_START, 3, noise_fn(4))
        state = ddpm.SampleState(jnp.int32(3), x_t, ())
        policy = dict(sampler=sampler, noise_fn=noise_fn)
        return ddpm.p_sample_steps(None, chain, network, state, 4, **policy).x_t

    expected = last_part()
    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    edit = partial(ddpm.image_to_image, denoise_fn=network, steps=4, sampler=sampler)
    alone = jax.jit(partial(edit, schedule=chain, first_sample=5))
    close(alone(key, x_start=X_START[5:6])[0], expected[5])
    close(jax.jit(partial(edit, None, noise_fn=noise_fn))(chain, x_start=X_START), expected)


def test_inversion_meets_the_exact_ode_and_comes_back():
    """Both errors halve when the steps double, also with a network that predicts v.

    For N(m, s²) the ODE keeps the place in the distribution: (x_t - √ᾱ m) / √(ᾱ s² + 1 - ᾱ).
    """
    full = ddpm.make_schedule(ddpm.linear_beta_schedule(8000, 1e-4 / 8, 0.02 / 8))
    x_0, mean, std = np.array([[-0.7], [0.1], [0.9]]), 0.3, 0.5

    def best_v(x, t):
        a = jnp.asarray(full.alphas_cumprod)[t].reshape(-1, 1)
        residual = (x - jnp.sqrt(a) * mean) / (a * std**2 + 1 - a)
        x_start = mean + jnp.sqrt(a) * std**2 * residual
        return jnp.sqrt(1 - a) * (jnp.sqrt(a) * residual - x_start)

    def errors(steps):
        schedule = ddpm.respace(full, ddpm.spaced_timesteps(8000, steps, "trailing"))
        x_T = ddpm.ddim_invert(schedule, best_v, x_0, prediction_type="v_prediction")
        policy = dict(prediction_type="v_prediction", clip_denoised=False)
        chain = partial(ddpm.p_sample_loop, None, schedule, best_v, x_0.shape, x_T=x_T)
        returned = chain(sampler=ddpm.ddim(), **policy)
        a = schedule.alphas_cumprod[-1]
        exact = np.sqrt(a) * mean + np.sqrt(a * std**2 + 1 - a) / std * (x_0 - mean)
        return np.abs(x_T - exact).max(), np.abs(returned - x_0).max()

    coarse, fine = errors(80), errors(160)
    assert fine[0] < 0.015 and fine[1] < 0.025
    np.testing.assert_allclose(np.divide(coarse, fine), 2, atol=0.2)


def test_inversion_has_a_gradient(network):
    """Of the picture that goes in, that of finite differences."""
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 4, "trailing"))
    invert = jax.jit(partial(ddpm.ddim_invert, schedule, network))
    check_grads(invert, (X_START,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-4)


def test_interpolation_gives_its_ends_back_by_default():
    """With a network that is off by 10 %. 1/√ᾱ_T is 4,000 here: unclipped, an error of ε leads
    anywhere."""
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(200))
    images = np.random.default_rng(0).choice([-1.0, 1.0], (64, 16))

    def denoise_fn(x, t):
        """ε of the posterior mean over the images (Bayes), off by a wave."""
        a = jnp.asarray(schedule.alphas_cumprod)[t][:, None]
        distances = jnp.sum((x[:, None] - jnp.sqrt(a)[..., None] * images[None]) ** 2, axis=-1)
        x_start = jax.nn.softmax(-distances / (2 * (1 - a))) @ images
        wave = 0.1 * jnp.sin(5 * x + t[:, None].astype(x.dtype) / 7)
        return (x - jnp.sqrt(a) * x_start) / jnp.sqrt(1 - a) + wave

    chain = ddpm.respace(schedule, ddpm.spaced_timesteps(200, 20, "trailing"))
    between = jax.jit(partial(ddpm.interpolate, chain, denoise_fn))
    a, middle, b = np.asarray(between(images[:4], images[4:8], np.array([0.0, 0.5, 1.0])))
    assert np.sqrt(np.mean((np.concatenate([a, b]) - images[:8]) ** 2)) < 0.05
    assert np.abs(middle - a).max() > 0.5 and np.abs(middle - b).max() > 0.5


def test_slerp_keeps_the_sphere():
    length = partial(np.linalg.norm, axis=(1, 2), keepdims=True)
    a, b = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    b *= length(a) / length(b)
    slerp = jax.jit(ddpm.slerp)
    for weight, end in ((np.zeros(3), a), (np.ones(3), b)):
        np.testing.assert_allclose(slerp(a, b, weight), end, rtol=1e-14, atol=1e-14)
    weights = np.array([0.25, 0.5, 0.9])
    between = slerp(a, b, weights)
    np.testing.assert_allclose(length(between), length(a), rtol=1e-12)
    for j, weight in enumerate(weights):
        whole, part = (np.arccos(np.vdot(a[j], x[j]) / np.vdot(a[j], a[j])) for x in (b, between))
        np.testing.assert_allclose(part, weight * whole, rtol=1e-7)


def test_slerp_on_a_line_is_straight():
    """Where a and b are parallel, opposite, or 0; and its gradient is finite there."""
    a = np.array([[1.0, 2.0], [1.0, 2.0], [1.0, 2.0], [0.0, 0.0]])
    b = np.array([[1.0, 2.0], [3.0, 6.0], [-1.0, -2.0], [4.0, 0.0]])
    between = jax.jit(ddpm.slerp)(a, b, 0.25)
    np.testing.assert_allclose(between, 0.75 * a + 0.25 * b, rtol=1e-14)
    gradient = jax.jit(jax.grad(lambda a: ddpm.slerp(a, b[:3], 0.25).sum()))(a[:3])
    np.testing.assert_allclose(gradient, np.full((3, 2), 0.75), rtol=1e-14)
