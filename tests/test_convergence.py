"""The error of every deterministic sampler falls with the order that its paper states."""

import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

MEAN, STD = 0.3, 0.5
STEPS = (64, 128, 256)


def chain(steps):
    """From λ = -5 to λ = 2, noise at both ends, in steps that shrink towards the image.

    Steps in λ of unequal length, as every real schedule has. The multistep rules start with a
    step of first order, whose error is of second order: at λ = -5 it is nothing, since x̂_0
    barely moves there. Begun at λ = -1 instead, order 3 falls back to slope 2 (1.94 to 1.99).
    """
    half_log_snr = 2 - 7 * np.linspace(0, 1, steps + 1) ** 1.5
    alphas_cumprod = 1 / (1 + np.exp(-2 * half_log_snr))
    full = ddpm.make_schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    kept = np.arange(1, steps + 1)
    return ddpm.respace(full, kept, final_alpha_cumprod=full.alphas_cumprod[0]), full


def error(sampler, steps):
    """Against the probability-flow ODE of N(m, s²), solved: x_t keeps its place in N(√ᾱ m, v)."""
    schedule, full = chain(steps)

    def denoise_fn(x, t):
        a = jnp.asarray(full.alphas_cumprod)[t].reshape(-1, 1)
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)

    x_T = np.linspace(-2, 2, 8).reshape(8, 1)
    ours = ddpm.p_sample_loop(
        None, schedule, denoise_fn, (8, 1), sampler=sampler, x_T=x_T, clip_denoised=False
    )
    start, end = full.alphas_cumprod[-1], full.alphas_cumprod[0]
    place = (x_T - np.sqrt(start) * MEAN) / np.sqrt(start * STD**2 + 1 - start)
    exact = np.sqrt(end) * MEAN + np.sqrt(end * STD**2 + 1 - end) * place
    return np.abs(ours - exact).max()


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (ddpm.ddim(), 1),
        (ddpm.dpm_solver_pp(1), 1),
        (ddpm.dpm_solver_pp(2), 2),
        (ddpm.dpm_solver_pp(3), 3),
        # Its last step, which has no entry to look ahead to, is Euler's: once, an error of h².
        (ddpm.heun(), 2),
    ],
    ids=["ddim", "dpm_1", "dpm_2", "dpm_3", "heun"],
)
def test_order_of_convergence(sampler, order):
    errors = np.array([error(sampler, steps) for steps in STEPS])
    slopes = np.log2(errors[:-1] / errors[1:])
    np.testing.assert_allclose(slopes, order, atol=0.25)


def test_heun_does_not_magnify_errors_where_sigma_falls_steeply(key):
    """Ten trailing steps of a cosine schedule, with a network that is off by 1 %.

    x̂_0 is clipped, or DDIM would magnify it too; Heun's correction goes past the clipping, and
    made the samples twice as wide as the data.
    """
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(200))
    chain = ddpm.respace(schedule, ddpm.spaced_timesteps(200, 10, "trailing"))

    def denoise_fn(x, t):  # the best ε for data N(0, 0.25), off by a wave
        a = jnp.asarray(schedule.alphas_cumprod)[t].reshape(-1, 1)
        return jnp.sqrt(1 - a) * x / (a / 4 + 1 - a) + 0.01 * jnp.sin(40 * x)

    def spread(sampler):
        return float(ddpm.p_sample_loop(key, chain, denoise_fn, (4000, 1), sampler=sampler).std())

    assert abs(spread(ddpm.heun()) - spread(ddpm.ddim())) < 0.05
    assert abs(spread(ddpm.heun()) - 0.5) < 0.1
