"""Every rule of `SAMPLERS` against closed forms, on data of one Gaussian and of two.

`dpm_solver_pp(1)` needs no row: it is DDIM, or the ancestral chain, and is tested to be.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import jax_ddpm as ddpm

SAMPLERS = {
    "ancestral": ddpm.ancestral(),
    "ddim": ddpm.ddim(),
    "ddim_half": ddpm.ddim(eta=0.5),
    "dpm_2": ddpm.dpm_solver_pp(2),
    "dpm_3": ddpm.dpm_solver_pp(3),
    "dpm_sde_3": ddpm.dpm_solver_pp(3, stochastic=True),
    "heun": ddpm.heun(),
}
SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
LONG = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
NOISE = np.random.default_rng(0).normal(size=(11, 8, 3))  # of `SHORT`: every entry, the start
X_START = np.tanh(np.random.default_rng(1).normal(size=(8, 3)))


@pytest.fixture(params=SAMPLERS)
def sampler(request):
    return SAMPLERS[request.param]


@partial(jax.jit, static_argnames=("sampler", "eps_fn", "clip_denoised"))
def run(sampler, eps_fn, full, schedule, noise, **policy):
    """A chain of `full` with `noise` for each entry, the start's last, and ε = eps_fn(x_t, ᾱ)."""
    table = jnp.asarray(full.alphas_cumprod, noise.dtype)
    denoise_fn = lambda x, t: eps_fn(x, table[t][:, None])
    policy = dict(clip_denoised=False, x_T=noise[-1], noise_fn=lambda i: noise[i]) | policy
    return ddpm.p_sample_loop(
        None, schedule, denoise_fn, noise.shape[1:], sampler=sampler, **policy
    )


def respaced(schedule, steps):
    kept = ddpm.spaced_timesteps(schedule.num_timesteps, steps, "trailing")
    return ddpm.respace(schedule, kept)


def network(x, a):
    return jnp.tanh(x) * a


MEAN, STD = 0.3, 0.5


@partial(jax.jit, static_argnums=0)
def walk(sampler, full, schedule, x_T, steps):
    """The last `steps` of a chain with the best ε for data N(MEAN, STD²), E[ε | x_t], so that one
    program runs every length."""

    def denoise_fn(x, t):
        a = jnp.asarray(full.alphas_cumprod)[t][:, None]
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * MEAN) / (a * STD**2 + 1 - a)

    def step(_, state):
        policy = dict(sampler=sampler, clip_denoised=False)
        return ddpm.p_sample_steps(None, schedule, denoise_fn, state, 1, **policy)

    state = ddpm.SampleState(jnp.int32(steps - 1), x_T, sampler.init(x_T))
    return jax.lax.fori_loop(0, steps, step, state).x_t


def error(sampler, steps):
    """Against the probability-flow ODE of N(m, s²), solved: x_t keeps its place in N(√ᾱ m, v).

    From λ = -5 to λ = 2, noise at both ends, in steps that shrink towards the image: of unequal
    length in λ, as every real schedule has. The multistep rules start with a step of first order,
    whose error is of second order: at λ = -5 it is nothing, since x̂_0 barely moves there. Begun at
    λ = -1 instead, order 3 falls back to slope 2 (1.94 to 1.99).
    """
    half_log_snr = 2 - 7 * (np.arange(257) / steps) ** 1.5  # entries above `steps` are not visited
    alphas_cumprod = 1 / (1 + np.exp(-2 * half_log_snr))
    full = ddpm.make_schedule(1 - alphas_cumprod / np.append(1.0, alphas_cumprod[:-1]))
    chain = ddpm.respace(full, np.arange(1, 257), final_alpha_cumprod=alphas_cumprod[0])
    x_T = np.linspace(-2, 2, 8).reshape(8, 1)
    start, end = alphas_cumprod[steps], alphas_cumprod[0]
    place = (x_T - np.sqrt(start) * MEAN) / np.sqrt(start * STD**2 + 1 - start)
    exact = np.sqrt(end) * MEAN + np.sqrt(end * STD**2 + 1 - end) * place
    return np.abs(walk(sampler, full, chain, x_T, steps) - exact).max()


# The last step of `heun`, which has no entry to look ahead to, is Euler's: once, an error of h².
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_2", 2), ("dpm_3", 3), ("heun", 2)])
def test_order_of_convergence(name, order):
    """The error of a deterministic rule, which needs no key, falls as its paper states."""
    errors = np.array([error(SAMPLERS[name], steps) for steps in (64, 128, 256)])
    slopes = np.log2(errors[:-1] / errors[1:])
    np.testing.assert_allclose(slopes, order, atol=0.25)


WEIGHTS, STDS = np.array([[0.3, 0.7]]), np.array([[0.2, 0.35]])
MEANS = np.array([[-0.8, 0.3], [0.6, -0.5]])


def mixture_eps(x, a):
    """The best ε for data Σ w_k N(μ_k, s_k² I) in the plane.

    x_t ~ Σ w_k N(√ᾱ μ_k, v_k I), v_k = ᾱ s_k² + 1 - ᾱ, and with the responsibilities r_k at x_t
    E[ε | x_t] = √(1 - ᾱ) Σ r_k (x_t - √ᾱ μ_k) / v_k.
    """
    v = a * STDS**2 + 1 - a
    gap = x[:, None] - jnp.sqrt(a)[..., None] * MEANS[None]
    r = jax.nn.softmax(np.log(WEIGHTS) - (gap**2).sum(2) / (2 * v) - jnp.log(v))
    return jnp.sqrt(1 - a) * ((r / v)[..., None] * gap).sum(1)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("ancestral", 400), ("ddim", 400), ("ddim_half", 400)]
    + [(name, 100) for name in ("dpm_2", "dpm_3", "dpm_sde_3", "heun")],
)
def test_moments_of_a_mixture(name, steps):
    """Mean, variance and the share of each mode: 4 standard errors, and 0.005 for finite steps."""
    noise = np.random.default_rng(0).normal(size=(steps + 1, 4000, 2))
    chain = respaced(LONG, steps)
    samples = np.asarray(run(SAMPLERS[name], mixture_eps, LONG, chain, noise))
    mean = (WEIGHTS @ MEANS)[0]
    variance = (WEIGHTS @ (STDS.T**2 + (MEANS - mean) ** 2))[0]
    left = (WEIGHTS * norm.cdf(-MEANS[:, 0] / STDS)).sum()
    square = (samples - mean) ** 2
    for seen, expected in ((samples, mean), (square, variance), (samples[:, :1] < 0, left)):
        standard_error = seen.std(0) / np.sqrt(4000)
        assert np.all(np.abs(seen.mean(0) - expected) < 4 * standard_error + 0.005)


def test_one_rule_written_two_ways():
    """Song et al. 2021a, §4.1; Lu et al. 2022b, §4.1 and §5: the same chain, clipped too."""

    def draw(sampler):
        return run(sampler, network, SCHEDULE, SHORT, NOISE, clip_denoised=True)

    close = partial(np.testing.assert_allclose, atol=1e-12)
    ancestral, ddim = draw(SAMPLERS["ancestral"]), draw(SAMPLERS["ddim"])
    close(draw(ddpm.ddim(eta=1.0)), ancestral)
    close(draw(ddpm.dpm_solver_pp(1)), ddim)
    close(draw(ddpm.dpm_solver_pp(1, stochastic=True)), ancestral)


def test_finite_and_so_are_its_gradients(sampler):
    """Also from pure noise (λ = -∞) to the image (λ = ∞), and where a last step has length 0."""

    @jax.jit
    @jax.value_and_grad
    def loss(x_T, schedule):
        policy = dict(noise_fn=lambda i: NOISE[0], prediction_type="v_prediction")
        draw = partial(ddpm.p_sample_loop, None, schedule, lambda x, t: jnp.sin(x), x_T.shape)
        return jnp.sum(draw(sampler=sampler, x_T=x_T, **policy) ** 2)

    linear = ddpm.linear_beta_schedule(200)
    for betas in (linear, ddpm.rescale_zero_terminal_snr(linear)):
        full = ddpm.make_schedule(betas)
        for end in (1.0, full.alphas_cumprod[0]):
            kept = ddpm.spaced_timesteps(200, 5, "linspace")
            value, gradient = loss(X_START, ddpm.respace(full, kept, final_alpha_cumprod=end))
            assert np.isfinite(value) and np.all(np.isfinite(gradient))


@pytest.mark.parametrize(
    ("sampler", "evaluations"),
    [(ddpm.ddim(), 10), (ddpm.heun(), 19), (ddpm.heun(max_slope=0.5), 12)],
)
def test_the_network_runs_no_oftener_than_its_output_is_used(sampler, evaluations):
    """Ten steps of Heun's method are 19 runs: the last is DDIM's, as are those that are too steep
    (√ᾱ' σ̂ is 0.15, 0.29, 0.43, 0.57, … from entry 0 on)."""
    runs = []

    def counted(x, a):
        jax.debug.callback(lambda: runs.append(1))
        return network(x, a)

    run(sampler, counted, SCHEDULE, SHORT, NOISE)
    jax.effects_barrier()
    assert len(runs) == evaluations


def test_heun_does_not_magnify_errors_where_sigma_falls_steeply():
    """Ten trailing steps of a cosine schedule, with a network that is off by 1 %.

    x̂_0 is clipped, or DDIM would magnify it too; Heun's correction goes past the clipping, and
    made the samples twice as wide as the data.
    """
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(200))
    noise = np.random.default_rng(0).normal(size=(1, 4000, 1))

    def wavy(x, a):  # the best ε for data N(0, 0.25), off by a wave
        return jnp.sqrt(1 - a) * x / (a / 4 + 1 - a) + 0.01 * jnp.sin(40 * x)

    draw = partial(run, schedule=respaced(schedule, 10), noise=noise, clip_denoised=True)
    heun, ddim = (np.std(draw(SAMPLERS[name], wavy, schedule)) for name in ("heun", "ddim"))
    assert abs(heun - ddim) < 0.05
    assert abs(heun - 0.5) < 0.1


@partial(jax.jit, static_argnums=0, static_argnames="variance_type")
def last_step(sampler, schedule, noise, **policy):
    """x_0 by one step from X_START, where ε is x / 2 and all of the noise is `noise`."""
    x_t = jnp.asarray(X_START)
    state = ddpm.SampleState(jnp.int32(0), x_t, sampler.init(x_t))
    policy = dict(sampler=sampler, noise_fn=lambda i: jnp.full(x_t.shape, noise), **policy)
    return ddpm.p_sample_steps(None, schedule, lambda x, t: x / 2, state, 1, **policy).x_t


@pytest.mark.parametrize("name", ["heun", "dpm_3"])
def test_the_last_step_reads_no_entry_that_wraps(name):
    """`table[t - 1]` at t = 0 wraps to the last entry. These rules read neighbouring entries too;
    their last step must not depend on the noisiest entry.
    """
    chains = [ddpm.respace(SCHEDULE, [3, 50, last]) for last in (150, 199)]
    ends = [last_step(SAMPLERS[name], chain, 0.0) for chain in chains]
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("name", ["ancestral", "ddim_half", "dpm_sde_3"])
def test_no_noise_is_added_at_t_0(name):
    """Noise added at t = 0 left every picture grainy: the last x_t is the mean, E[x_0 | x_1]."""
    step = partial(last_step, SAMPLERS[name], SCHEDULE, variance_type="fixed_large")
    np.testing.assert_array_equal(step(0.0), step(1e3))
    # By hand: x̂_0 = (x - √β_0 ε) / √(1 - β_0), clipped, with ε = x / 2.
    x_start = X_START * (1 - np.sqrt(1e-4) / 2) / np.sqrt(1 - 1e-4)
    np.testing.assert_allclose(step(0.0), np.clip(x_start, -1, 1), atol=1e-12)
