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
SHAPE = (8, 4, 4, 3)
MASK = np.ones((4, 4, 1)).astype(bool)
MASK[1:3, 1:4] = False
JUMPS = {"jump_length": 3, "resamples": 2}


def network(x, t):
    """Sees every pixel of its image and the timestep, but no other image."""
    mixed = jnp.tanh(x + x.mean(axis=(1, 2, 3), keepdims=True))
    return mixed * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)


@pytest.fixture
def x_start(key):
    return jnp.tanh(jax.random.normal(jax.random.fold_in(key, 99), SHAPE))


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


def test_what_is_known_is_kept_to_the_bit(key, x_start):
    whole = jax.jit(lambda x: ddpm.inpaint(key, SHORT, network, x, MASK, **JUMPS))(x_start)
    known = np.broadcast_to(MASK, SHAPE)
    np.testing.assert_array_equal(whole[known], x_start[known])
    assert np.all(whole[~known] != x_start[~known])
    noisy = ddpm.respace(SCHEDULE, [10, 110], final_alpha_cumprod=float(SCHEDULE.alphas_cumprod[5]))
    mask = MASK.astype(float)
    whole = jax.jit(lambda x: ddpm.inpaint(key, noisy, network, x, mask, resamples=1))(x_start)
    np.testing.assert_array_equal(whole[known], x_start[known])


def test_without_a_mask_and_jumps_it_is_the_sampler(key, x_start):
    """Nothing known, nothing resampled: `p_sample_loop`, with its very draws."""
    nothing = np.zeros((4, 4, 1))
    free = jax.jit(lambda x: ddpm.inpaint(key, SHORT, network, x, nothing, resamples=1))(x_start)
    expected = jax.jit(lambda key: ddpm.p_sample_loop(key, SHORT, network, SHAPE))(key)
    np.testing.assert_allclose(free, expected, rtol=1e-12, atol=1e-12)


def test_in_any_batch_on_a_mesh_and_with_a_traced_schedule(key, x_start):
    def paint(schedule, x_start, **policy):
        return ddpm.inpaint(
            schedule=schedule, denoise_fn=network, x_start=x_start, mask=MASK, **JUMPS, **policy
        )

    close = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
    whole = jax.jit(partial(paint, SHORT, key=key))(x_start)
    close(jax.jit(partial(paint, key=key, first_sample=5))(SHORT, x_start[5:6])[0], whole[5])
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    sharding = NamedSharding(mesh, P("data"))
    close(jax.jit(partial(paint, SHORT, key=key, sharding=sharding))(x_start), whole)


def test_every_visit_has_its_own_draw(x_start):
    """Numbered downwards: N for the start, N - 1 for the first visit, 0 for the last."""
    visits = len(ddpm.repaint_walk(10, **JUMPS)[0])
    seen = []

    def noise_fn(n):
        jax.debug.callback(lambda n: seen.append(int(n)), n, ordered=True)
        return jnp.zeros(SHAPE)

    ddpm.inpaint(None, SHORT, network, x_start, MASK, noise_fn=noise_fn, **JUMPS)
    jax.effects_barrier()
    assert seen == list(range(visits, -1, -1))


def test_program_and_memory_do_not_grow_with_the_walk(key, x_start):
    def compiled(steps, jump_length, resamples):
        schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, steps))
        paint = jax.jit(
            lambda key: ddpm.inpaint(
                key,
                schedule,
                network,
                x_start,
                MASK,
                jump_length=jump_length,
                resamples=resamples,
            )
        )
        return paint.lower(key).compile()

    short, long = compiled(50, 5, 3), compiled(200, 10, 10)
    assert len(long.as_text().splitlines()) <= len(short.as_text().splitlines())
    temporary = [each.memory_analysis().temp_size_in_bytes for each in (short, long)]
    assert temporary[1] - temporary[0] < x_start.nbytes


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


def test_two_correlated_pixels(diffusers, key):
    """One known, the other's moments: RePaint's exactly, and near the conditional's.

    RePaint forgets at each level which noise the known part had, so it is not the conditional
    distribution, not even with the best ε, but resampling brings it nearer.
    """
    mean, std, correlation, x, count = np.array([0.2, -0.1]), 0.6, 0.8, 1.0, 2000
    covariance = std**2 * np.array([[1, correlation], [correlation, 1]])
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(50, 2e-3, 0.4))
    precision = np.stack(
        [np.linalg.inv(a * covariance + (1 - a) * np.eye(2)) for a in schedule.alphas_cumprod]
    )

    def best_eps(x_t, t):
        a = jnp.asarray(schedule.alphas_cumprod)[t].reshape(-1, 1)
        residual = x_t - jnp.sqrt(a) * mean[None]
        return jnp.sqrt(1 - a) * jnp.einsum("bij,bj->bi", jnp.asarray(precision)[t], residual)

    paint = jax.jit(
        lambda x_start: ddpm.inpaint(
            key,
            schedule,
            best_eps,
            x_start,
            np.array([1.0, 0.0]),
            jump_length=5,
            resamples=10,
            clip_denoised=False,
        )
    )
    unknown = np.asarray(paint(jnp.full((count, 2), x))[:, 1])
    expected, variance = exact_moments(diffusers, schedule, mean, covariance, x, 5, 10)
    assert abs(unknown.mean() - expected) < 4 * np.sqrt(variance / count)
    assert abs(unknown.var() - variance) < 4 * variance * np.sqrt(2 / count)

    # The conditional is N(0.54, 0.1296).
    conditional = mean[1] + correlation * (x - mean[0]), std**2 * (1 - correlation**2)
    without = exact_moments(diffusers, schedule, mean, covariance, x, 5, 1)
    np.testing.assert_allclose(np.abs(np.subtract(without, conditional)), (0.26, 0.017), atol=5e-3)
    resampled = np.abs(np.subtract((expected, variance), conditional))
    np.testing.assert_allclose(resampled, (0.10, 0.012), atol=5e-3)


def test_bad_input_is_named(untyped, key, x_start):
    paint = partial(ddpm.inpaint, key, SHORT, network, x_start, MASK)
    with pytest.raises(ValueError, match="jump_length: expected 1 to 9 .*, got 10"):
        paint()
    with pytest.raises(ValueError, match="jump_length: expected 1 to 9 .*, got 0"):
        paint(jump_length=0)
    with pytest.raises(ValueError, match="resamples: expected at least 1, got 0"):
        paint(resamples=0)
    with pytest.raises(ValueError, match="key: expected a key"):
        ddpm.inpaint(None, SHORT, network, x_start, MASK, **JUMPS)
    with pytest.raises(ValueError, match="broadcast"):
        ddpm.inpaint(key, SHORT, network, x_start, np.ones((3, 3, 1)), **JUMPS)
