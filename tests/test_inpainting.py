from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_ddpm as ddpm
from jax_ddpm.editing import repaint_walk

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
    entries, up = repaint_walk(timesteps, jump_length, resamples)
    reached = np.where(up, entries, entries - 1)
    np.testing.assert_array_equal([timesteps - 1, *reached[:-1]], reference.timesteps)
    assert reached[-1] == -1


@pytest.mark.parametrize("dtype", [bool, np.uint8, float])
def test_what_is_known_is_kept_to_the_bit_in_any_batch(key, dtype, network):
    """With masks of any dtype, a traced schedule, and where the chain ends in noise."""
    end = SCHEDULE.alphas_cumprod[5]
    noisy = ddpm.respace(SCHEDULE, SHORT.timesteps, final_alpha_cumprod=end)
    paint = partial(ddpm.inpaint, denoise_fn=network, mask=MASK.astype(dtype), **JUMPS)
    whole = np.asarray(jax.jit(partial(paint, schedule=noisy))(key, x_start=X_START))
    np.testing.assert_array_equal(whole[KNOWN], X_START[KNOWN])
    assert np.all(whole[~KNOWN] != X_START[~KNOWN])
    alone = jax.jit(partial(paint, first_sample=5))(key, noisy, x_start=X_START[5:6])
    np.testing.assert_allclose(alone[0], whole[5], rtol=1e-10, atol=1e-10)


def test_every_visit_is_that_of_diffusers(torch, diffusers, network):
    """Its steps down and undone steps, along its walk, with the same noise."""
    theirs = diffusers.RePaintScheduler(10, trained_betas=SHORT.betas, eta=1.0, clip_sample=False)
    theirs.set_timesteps(10, *JUMPS.values())
    levels = [*theirs.timesteps.tolist(), -1]
    draw = partial(torch.randn, SHAPE, dtype=torch.float64)
    # It draws with one generator what the other draws here: the start, then a visit at a time.
    generator, twin = (torch.Generator().manual_seed(0) for _ in range(2))
    noise = torch.stack([draw(generator=twin) for _ in levels]).numpy()[::-1].copy()
    x, known, mask = draw(generator=generator), torch.tensor(X_START), torch.tensor(1.0 * MASK)
    denoise_fn = jax.jit(network)
    for now, then in pairwise(levels):
        if then > now:
            x = theirs.undo_step(x, then, generator)
        else:
            output = np.array(denoise_fn(x.numpy(), np.full(8, SHORT.timesteps[now])))
            x = theirs.step(torch.tensor(output), now, x, known, mask, generator).prev_sample
    policy = dict(clip_denoised=False, noise_fn=lambda n: jnp.asarray(noise)[n], **JUMPS)
    ours = jax.jit(partial(ddpm.inpaint, None, SHORT, network, mask=MASK, **policy))(X_START)
    np.testing.assert_allclose(ours, x.numpy(), rtol=0, atol=1e-12)


def test_without_a_mask_and_jumps_it_is_the_sampler(network):
    """Nothing known, nothing resampled: `p_sample_loop`, with its very draws."""
    noise = jnp.asarray(np.random.default_rng(1).normal(size=(11, *SHAPE)))
    chain, policy = (None, SHORT, network), dict(noise_fn=lambda n: noise[n])
    free = ddpm.inpaint(*chain, X_START, np.zeros((4, 4, 1)), resamples=1, **policy)
    expected = ddpm.p_sample_loop(*chain, SHAPE, x_T=noise[10], **policy)
    np.testing.assert_allclose(free, expected, rtol=1e-12, atol=1e-12)


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
