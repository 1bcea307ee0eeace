"""Bugs of other diffusion code, in JAX and torch, each kept out of this one by a test."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHAPE = (2, 4, 4, 3)
SPACINGS = ["leading", "trailing", "linspace"]


def states_on_the_way(sampler, spacing, x_start, eps):
    """A noiseless chain of 7 steps that is told the ε in x_t, from √ᾱ x_0 + √(1 - ᾱ) ε on.

    Returns ᾱ of each entry and x_t there, the start first, x_0 left out.
    """
    kept = ddpm.spaced_timesteps(200, 7, spacing)
    alphas_cumprod = SCHEDULE.alphas_cumprod[kept][::-1]

    def denoise_fn(x, t):
        a = jnp.asarray(SCHEDULE.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
        return (x - jnp.sqrt(a) * x_start) / jnp.sqrt(1 - a)

    x_T = np.sqrt(alphas_cumprod[0]) * x_start + np.sqrt(1 - alphas_cumprod[0]) * eps
    last, states = ddpm.p_sample_loop(
        None,
        ddpm.respace(SCHEDULE, kept),
        denoise_fn,
        SHAPE,
        sampler=sampler,
        x_T=x_T,
        noise_fn=lambda i: jnp.zeros(SHAPE),
        clip_denoised=False,
        save_every=1,
    )
    np.testing.assert_allclose(last, x_start, atol=1e-12)
    return alphas_cumprod, [x_T, *states[:-1]]


@pytest.fixture
def x_start(key):
    return jax.random.uniform(key, SHAPE, minval=-1.0, maxval=1.0)


@pytest.fixture
def eps():
    return jax.random.normal(jax.random.key(1), SHAPE)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_strided_ancestral_sampling_reads_alpha_bar_of_the_kept_entry_before(spacing, x_start, eps):
    """Strided sampling that still used ᾱ[t - 1] made images of noise (diffusers' Flax DDPM).

    The oracle is the conditional of two jointly normal variables: given x_0, x_s and x_t have
    the covariance √(ᾱ_t / ᾱ_s) (1 - ᾱ_s).
    """
    alphas_cumprod, states = states_on_the_way(ddpm.ancestral(), spacing, x_start, eps)
    for n in range(1, len(states)):
        a_t, a_s = alphas_cumprod[n - 1], alphas_cumprod[n]
        slope = np.sqrt(a_t / a_s) * (1 - a_s) / (1 - a_t)
        expected = np.sqrt(a_s) * x_start + slope * (states[n - 1] - np.sqrt(a_t) * x_start)
        np.testing.assert_allclose(states[n], expected, atol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ddim_reads_alpha_bar_of_the_kept_entry_before(spacing, x_start, eps):
    """DDIM that reads ᾱ[t - T / S], which under linspace and trailing is no kept entry (diffusers).

    Told the true ε, DDIM stays on √ᾱ x_0 + √(1 - ᾱ) ε.
    """
    alphas_cumprod, states = states_on_the_way(ddpm.ddim(), spacing, x_start, eps)
    for a, x_t in zip(alphas_cumprod, states, strict=True):
        np.testing.assert_allclose(x_t, np.sqrt(a) * x_start + np.sqrt(1 - a) * eps, atol=1e-12)


def test_each_step_has_fresh_noise(key):
    """One default key for every step gave the same noise each time.

    A chain whose rule adds its noise to nothing shows what was drawn.
    """

    def step(schedule, predict, noise_fn, i, x_t, memory):
        return noise_fn(i), memory

    sampler = ddpm.Sampler(init=lambda x_T: (), step=step)
    short = ddpm.respace(SCHEDULE, range(50))
    network = lambda x, t: x  # noqa: E731
    _, drawn = ddpm.p_sample_loop(key, short, network, SHAPE, sampler=sampler, save_every=1)
    assert np.unique(drawn).size == drawn.size
    correlation = np.corrcoef(drawn.reshape(50, -1)) - np.eye(50)
    assert np.abs(correlation).max() < 6 / np.sqrt(np.prod(SHAPE))


def test_alpha_bar_before_the_first_entry_is_one():
    """`alphas_cumprod[t - 1]` at t = 0 wraps to the last entry: x_0 came out as noise."""
    short = ddpm.respace(SCHEDULE, [3, 50, 199])
    for schedule in (SCHEDULE, short):
        assert schedule.alphas_cumprod_prev[0] == 1
        np.testing.assert_array_equal(
            schedule.alphas_cumprod_prev[1:], schedule.alphas_cumprod[:-1]
        )


@pytest.mark.parametrize("sampler", [ddpm.heun(), ddpm.dpm_solver_pp(3)], ids=["heun", "dpm_3"])
def test_the_last_step_reads_no_entry_that_wraps(sampler, x_start):
    """The same slip in rules that look at other entries than their own: i - 1 and i + 1, i + 2.

    The steps of a chain do not change when its noisiest entry, where the wrap would lead, does.
    """
    ends = []
    for last in (150, 199):
        schedule = ddpm.respace(SCHEDULE, [3, 50, last])
        state = ddpm.SampleState(jnp.int32(0), x_start, sampler.init(x_start))
        run = partial(ddpm.p_sample_steps, None, schedule, lambda x, t: x / 2)
        ends.append(run(state, 1, sampler=sampler).x_t)
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 7, 10, 199, 200])
def test_spaced_timesteps_are_entries_of_the_chain(spacing, steps):
    """`linspace(0, T, S + 1)` starts at t = T, one past the end; JAX clamps it in silence."""
    kept = ddpm.spaced_timesteps(200, steps, spacing)
    assert kept.size == steps and kept[0] >= 0 and kept[-1] <= 199
    assert np.all(np.diff(kept) > 0)


@pytest.mark.parametrize("variance_type", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize(
    "sampler",
    [ddpm.ancestral(), ddpm.ddim(eta=1.0), ddpm.dpm_solver_pp(2, stochastic=True)],
    ids=["ancestral", "ddim_full", "dpm_sde_2"],
)
def test_no_noise_is_added_at_t_0(sampler, variance_type, x_start):
    """Noise added at t = 0 left every picture grainy: the last x_t is the mean, E[x_0 | x_1]."""
    run = partial(
        ddpm.p_sample_steps,
        None,
        SCHEDULE,
        lambda x, t: x / 2,
        ddpm.SampleState(jnp.int32(0), x_start, sampler.init(x_start)),
        1,
        sampler=sampler,
        variance_type=variance_type,
    )
    quiet, loud = (run(noise_fn=lambda i, s=s: jnp.full(SHAPE, s)).x_t for s in (0.0, 1e3))
    np.testing.assert_array_equal(quiet, loud)
    mean = ddpm.p_mean_variance(SCHEDULE, lambda x, t: x / 2, x_start, 0).pred_xstart
    np.testing.assert_allclose(quiet, mean, atol=1e-12)
