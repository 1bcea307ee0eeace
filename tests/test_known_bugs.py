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


def learned(value):
    """A network that halves x and says `value` for the variance of every pixel."""
    return lambda x, t: jnp.concatenate([x / 2, jnp.full_like(x, value)], axis=-1)


def test_learned_variance_is_split_off_at_c_channels(x_start):
    """`jnp.split(x, C)` makes C pieces, as NumPy's; torch's makes pieces of C channels."""
    p = ddpm.p_mean_variance(
        SCHEDULE,
        learned(-3.0),
        x_start,
        100,
        prediction_type="sample",
        variance_type="learned",
        clip_denoised=False,
    )
    np.testing.assert_array_equal(p.pred_xstart, x_start / 2)
    np.testing.assert_array_equal(p.log_variance, np.full(SHAPE, -3.0))


@pytest.mark.parametrize(
    ("variance_type", "value", "variance"),
    [
        ("learned", -3.0, np.exp(-3.0)),
        ("fixed_large", 0.0, SCHEDULE.betas[100]),
        ("learned_range", 1.0, SCHEDULE.betas[100]),
        ("learned_range", -1.0, SCHEDULE.posterior_variance[100]),
    ],
)
def test_noise_is_scaled_by_the_root_of_the_variance(variance_type, value, variance, x_start):
    """A log-variance taken for a variance is negative, and its root NaN."""
    network = learned(value) if variance_type != "fixed_large" else lambda x, t: x / 2
    state = ddpm.SampleState(jnp.int32(100), x_start, ())
    run = partial(
        ddpm.p_sample_steps, None, SCHEDULE, network, state, 1, variance_type=variance_type
    )
    quiet, loud = (run(noise_fn=lambda i, s=s: jnp.full(SHAPE, s)).x_t for s in (0.0, 1.0))
    np.testing.assert_allclose(loud - quiet, np.full(SHAPE, np.sqrt(variance)), rtol=1e-9)


def test_learned_range_is_a_geometric_mean(x_start):
    """Half way between the bounds lies √(β β̃), not (β + β̃) / 2: logarithms are mixed."""
    p = ddpm.p_mean_variance(SCHEDULE, learned(0.0), x_start, 1, variance_type="learned_range")
    expected = np.sqrt(SCHEDULE.betas[1] * SCHEDULE.posterior_variance[1])
    np.testing.assert_allclose(p.variance, np.full(SHAPE, expected), rtol=1e-12)


def test_tables_are_float64_also_where_jax_has_none():
    """`dtype=float64` without x64 is float32 in silence: here tables never pass through JAX."""
    expected = ddpm.make_schedule(ddpm.cosine_beta_schedule(4000))
    with jax.enable_x64(False):
        schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(4000))
        kept = ddpm.respace(schedule, ddpm.spaced_timesteps(4000, 100))
        x = jnp.zeros((4000, 1))
        assert x.dtype == jnp.float32
        betas = ddpm.extract(schedule.betas, np.arange(4000), x)[:, 0]
    assert all(table.dtype == np.float64 for table in kept[:-1])
    np.testing.assert_array_equal(schedule.betas, expected.betas)
    np.testing.assert_array_equal(betas, expected.betas.astype(np.float32))


@pytest.mark.parametrize(
    ("prediction_type", "high", "low"),
    [("epsilon", 0.05, 1), ("sample", 5, 0.01), ("v_prediction", 5 / 101, 0.01 / 1.01)],
)
def test_min_snr_clamps_from_above(prediction_type, high, low):
    """The clamp the wrong way round, max(SNR, γ), made the easiest steps count most.

    γ = 5 at SNR 100 and 0.01, by hand from Hang et al. 2023, §3.4. A network that is off by 1
    shows the weight as its loss.
    """
    alphas_cumprod = np.array([100 / 101, 0.01 / 1.01])
    schedule = ddpm.make_schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    x_start = noise = np.zeros((2, 3))
    losses = ddpm.training_losses(
        schedule,
        lambda x, t: jnp.ones_like(x),
        x_start,
        np.array([0, 1]),
        noise,
        prediction_type=prediction_type,
        weighting="min_snr",
    )
    np.testing.assert_allclose(losses, [high, low], rtol=1e-9)


def test_the_trajectory_is_not_kept(key):
    """A scan that stacks every x_t costs T pictures, whether they are looked at or not."""
    loop = jax.jit(lambda key: ddpm.p_sample_loop(key, SCHEDULE, lambda x, t: x / 2, SHAPE))
    memory = loop.lower(key).compile().memory_analysis()
    picture = 8 * np.prod(SHAPE)
    assert memory.output_size_in_bytes == picture
    assert memory.temp_size_in_bytes < 20 * picture  # of the 200 on the way
