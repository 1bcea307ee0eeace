from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (8, 4, 4, 3)
MASK = np.ones((4, 4, 1)).astype(bool)
MASK[1:3, 1:4] = False
KNOWN = np.broadcast_to(MASK, SHAPE)
JUMPS = {"jump_length": 3, "resamples": 2}
X_START = np.tanh(np.random.default_rng(0).normal(size=SHAPE))
QUIET = {"noise_fn": lambda n: jnp.full(SHAPE, 0.1)}


@pytest.mark.parametrize(
    ("timesteps", "jump_length", "resamples"),
    [(250, 10, 10), (100, 10, 3), (20, 3, 2), (7, 1, 4), (10, 9, 2), (5, 2, 1)],
)
def test_walk_is_that_of_diffusers(diffusers, timesteps, jump_length, resamples):
    """Its `RePaintScheduler` follows the authors' code; it lists the levels, less the last."""
    reference = diffusers.RePaintScheduler(timesteps)
    reference.set_timesteps(timesteps, jump_length, resamples)
    entries, up = ddpm.repaint_walk(timesteps, jump_length, resamples)
    reached = np.where(up, entries, entries - 1)
    np.testing.assert_array_equal([timesteps - 1, *reached[:-1]], reference.timesteps)
    assert reached[-1] == -1


def test_walk_takes_every_step_as_often_as_the_paper_says():
    """T = 250 with jumps of 10 from 0, 10, … 230, nine times each."""
    entries, up = ddpm.repaint_walk(250, jump_length=10, resamples=10)
    assert len(entries) == 250 + 24 * 9 * 2 * 10 == 4570
    down_visits = np.bincount(entries[~up], minlength=250)
    np.testing.assert_array_equal(down_visits, [1, *[10] * 240, *[1] * 9])
    np.testing.assert_array_equal(np.bincount(entries[up]), [0, *[9] * 240])


@pytest.mark.parametrize("dtype", [bool, np.uint8, float])
def test_what_is_known_is_kept_to_the_bit_in_any_batch(key, dtype, network):
    """With masks of any dtype, a traced schedule, and where the chain ends in noise."""
    kept, end = SHORT.timesteps, SCHEDULE.alphas_cumprod[5]
    noisy = ddpm.respace(SCHEDULE, kept, final_alpha_cumprod=end)
    paint = partial(ddpm.inpaint, denoise_fn=network, mask=MASK.astype(dtype), **JUMPS)
    whole = np.asarray(jax.jit(partial(paint, schedule=noisy))(key, x_start=X_START))
    np.testing.assert_array_equal(whole[KNOWN], X_START[KNOWN])
    assert np.all(whole[~KNOWN] != X_START[~KNOWN])
    alone = jax.jit(partial(paint, first_sample=5))(key, noisy, x_start=X_START[5:6])
    np.testing.assert_allclose(alone[0], whole[5], rtol=1e-10, atol=1e-10)


def test_without_a_mask_and_jumps_it_is_the_sampler(network):
    """Nothing known, nothing resampled: `p_sample_loop`, with its very draws."""
    noise = np.random.default_rng(1).normal(size=(11, *SHAPE))
    policy = dict(noise_fn=lambda n: jnp.asarray(noise)[n])
    nothing = dict(mask=np.zeros((4, 4, 1)), resamples=1, **policy)
    free = jax.jit(partial(ddpm.inpaint, None, SHORT, network, **nothing))(X_START)
    draw = partial(ddpm.p_sample_loop, None, SHORT, network, SHAPE, **policy)
    expected = jax.jit(lambda x_T: draw(x_T=x_T))(noise[10])
    np.testing.assert_allclose(free, expected, rtol=1e-12, atol=1e-12)


def test_every_visit_has_its_own_draw(network):
    """Numbered downwards: N for the start, N - 1 for the first visit, 0 for the last."""
    visits = len(ddpm.repaint_walk(10, **JUMPS)[0])
    seen = []

    def noise_fn(n):
        jax.debug.callback(lambda n: seen.append(int(n)), n, ordered=True)
        return jnp.zeros(SHAPE)

    ddpm.inpaint(None, SHORT, network, X_START, MASK, noise_fn=noise_fn, **JUMPS)
    jax.effects_barrier()
    assert seen == list(range(visits, -1, -1))


def test_program_and_memory_do_not_grow_with_the_walk(network):
    def compiled(steps, jump_length, resamples):
        schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, steps))
        policy = dict(jump_length=jump_length, resamples=resamples, **QUIET)
        paint = jax.jit(partial(ddpm.inpaint, None, schedule, network, mask=MASK, **policy))
        return paint.lower(X_START).compile()

    short, long = compiled(50, 5, 3), compiled(200, 10, 10)
    assert len(long.as_text().splitlines()) <= len(short.as_text().splitlines())
    temporary = [each.memory_analysis().temp_size_in_bytes for each in (short, long)]
    assert temporary[1] - temporary[0] < X_START.nbytes


@pytest.mark.slow
def test_it_has_a_gradient(network):
    """Of the picture that goes in, that of finite differences."""
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 4, "trailing"))
    policy = dict(mask=MASK, jump_length=2, resamples=2, clip_denoised=False, **QUIET)
    paint = jax.jit(partial(ddpm.inpaint, None, schedule, network, **policy))
    check_grads(paint, (X_START,), order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-4)


def exact_moments(diffusers, schedule, mean, covariance, x, jump_length, resamples):
    """Of RePaint's output on two Gaussian pixels, the first known to be `x`: every step is affine.

    Along diffusers' walk, with x_0 given x_t and x_{t-1} given both by Bayes' rule.
    """
    timesteps = len(schedule.betas)
    walk = diffusers.RePaintScheduler(timesteps)
    walk.set_timesteps(timesteps, jump_length, resamples)
    levels = [*walk.timesteps.tolist(), -1]
    alpha_bar = np.append(np.cumprod(1 - schedule.betas), 1.0)  # level -1 is the picture
    m, c, identity = np.zeros(2), np.eye(2), np.eye(2)
    for now, then in zip(levels, levels[1:], strict=False):
        if then > now:
            beta = schedule.betas[then]
            m, c = np.sqrt(1 - beta) * m, (1 - beta) * c + beta * identity
            continue
        a, a_prev, beta = alpha_bar[now], alpha_bar[then], schedule.betas[now]
        gain = np.sqrt(a) * covariance @ np.linalg.inv(a * covariance + (1 - a) * identity)
        to_x_start = np.sqrt(a_prev) * beta / (1 - a)
        slope = to_x_start * gain + np.sqrt(1 - beta) * (1 - a_prev) / (1 - a) * identity
        offset = to_x_start * (mean - gain @ (np.sqrt(a) * mean))
        m = slope @ m + offset
        c = slope @ c @ slope.T + beta * (1 - a_prev) / (1 - a) * identity
        m[0] = np.sqrt(a_prev) * x
        c[0, :] = c[:, 0] = 0
        c[0, 0] = 1 - a_prev
    return m[1], c[1, 1]


def test_two_correlated_pixels(diffusers):
    """One known, the other's moments: exactly those of RePaint with the best ε.

    RePaint forgets at each level which noise the known part had, so it is not the conditional
    distribution, but resampling brings it nearer.
    """
    mean, std, correlation, x = np.array([0.2, -0.1]), 0.6, 0.8, 1.0
    covariance = std**2 * np.array([[1, correlation], [correlation, 1]])
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(50, 2e-3, 0.4))
    precision = np.stack(
        [np.linalg.inv(a * covariance + (1 - a) * np.eye(2)) for a in schedule.alphas_cumprod]
    )

    def best_eps(x_t, t):
        a = jnp.asarray(schedule.alphas_cumprod)[t].reshape(-1, 1)
        residual = x_t - jnp.sqrt(a) * mean[None]
        return jnp.sqrt(1 - a) * jnp.einsum("bij,bj->bi", jnp.asarray(precision)[t], residual)

    @jax.jit
    def paint(noise):
        policy = dict(jump_length=5, resamples=10, clip_denoised=False)
        x_start, mask = jnp.full(noise.shape[1:], x), np.array([1.0, 0.0])
        draw = partial(ddpm.inpaint, None, schedule, best_eps, x_start, mask, **policy)
        return draw(noise_fn=lambda n: noise[n])

    # Sample 0 has no noise, and each other only one number of one visit, which is 1.
    draws = len(ddpm.repaint_walk(50, 5, 10)[0]) + 1
    noise = np.eye(2 * draws, 2 * draws + 1, k=1).reshape(draws, 2, -1)
    offset, *others = np.asarray(paint(noise.transpose(0, 2, 1)))[:, 1]
    expected, variance = exact_moments(diffusers, schedule, mean, covariance, x, 5, 10)
    np.testing.assert_allclose(offset, expected, rtol=1e-9)
    np.testing.assert_allclose(np.sum((others - offset) ** 2), variance, rtol=1e-9)

    conditional = mean[1] + correlation * (x - mean[0])
    without, _ = exact_moments(diffusers, schedule, mean, covariance, x, 5, 1)
    assert abs(expected - conditional) < abs(without - conditional) / 2
