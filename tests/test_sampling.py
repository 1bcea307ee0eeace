"""The loop: the same chain however it is run, for rules of every kind.

The rules themselves are tested in `test_samplers`.
"""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import jax_ddpm as ddpm

# With noise, with a memory, and with a branch: the loop knows no other kinds.
SAMPLERS = {"ancestral": ddpm.ancestral(), "dpm_3": ddpm.dpm_solver_pp(3), "heun": ddpm.heun()}
SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHORT = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
SHAPE = (8, 2, 2, 3)
# Rounding of pixels near 1 in float64, over the ten steps of `SHORT`: the most that was seen is
# 7e-16 on jax 0.12.0.1, and nothing on 0.10.2.
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-13)


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_chain_is_the_same_however_it_is_run(name, no_new_program, network):
    """But for rounding, since XLA compiles another program for each way."""
    sampler, keys = SAMPLERS[name], jax.vmap(jax.random.key)(np.arange(2))
    key_0, key_1 = keys
    loop = jax.jit(lambda key: ddpm.p_sample_loop(key, SHORT, network, SHAPE, sampler=sampler))
    whole = np.asarray(loop(key_0))
    with no_new_program():
        other = np.asarray(loop(key_1))
    assert np.any(other != whole) and np.any(whole[5] != whole[4])

    # Alone and under vmap: sample 5 of one key, and sample 0 of the other.
    @jax.jit
    @jax.vmap
    def alone(key, number):
        policy = dict(sampler=sampler, first_sample=number)
        return ddpm.p_sample_loop(key, SHORT, network, (1, *SHAPE[1:]), **policy)[0]

    close(alone(keys, np.array([5, 0])), [whole[5], other[0]])

    # Eager, with draws that are handed in: x_T has that of entry T, and no key is needed.
    noise_fn = lambda i: ddpm.sample_noise(key_0, i, SHAPE)
    x_T = noise_fn(10)
    policy = dict(sampler=sampler, noise_fn=noise_fn)
    draw = partial(ddpm.p_sample_loop, None, SHORT, network, SHAPE, x_T=x_T, **policy)
    eager, states = draw(save_every=3)
    assert eager.shape == SHAPE and eager.dtype == jnp.float64 and states.shape == (3, *SHAPE)
    close(eager, whole)

    # In pieces, which end in the saved states.
    run = jax.jit(partial(ddpm.p_sample_steps, None, SHORT, network, **policy), static_argnums=1)
    state = ddpm.p_sample_init(None, SHORT, SHAPE, sampler=sampler, x_T=x_T)
    for saved in states:
        state = run(state, 3)
        close(saved, state.x_t)
    state = run(state, 1)
    assert int(state.i) == -1
    close(state.x_t, whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_program_and_memory_do_not_grow_with_the_chain(name, key, network):
    """Nothing of the trajectory is kept."""

    def compiled(timesteps):
        schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(timesteps))
        draw = partial(ddpm.p_sample_loop, key, schedule, network, SHAPE, sampler=SAMPLERS[name])
        return jax.jit(lambda x_T: draw(x_T=x_T)).lower(np.zeros(SHAPE)).compile()

    short, long = compiled(50), compiled(1000)
    assert len(long.as_text().splitlines()) == len(short.as_text().splitlines())
    before, after = (each.memory_analysis() for each in (short, long))
    assert after.output_size_in_bytes == 8 * np.prod(SHAPE)
    grown = after.temp_size_in_bytes - before.temp_size_in_bytes
    # A branch, as heun has, is given a copy of the schedule's table.
    assert grown == 0 or name == "heun" and grown < 1.01 * 4 * (1000 - 50)


def outcome(schedule, sampler, params, x_T):
    """A number made of x_0, with a network of one hidden layer."""

    def denoise_fn(x, t):
        time = jnp.cos(t.astype(x.dtype) / 50).reshape(-1, 1, 1)
        return jnp.tanh(x @ params["in"] + time) @ params["out"]

    noise_fn = lambda i: jnp.full(x_T.shape, 0.1)
    policy = dict(sampler=sampler, clip_denoised=False, x_T=x_T, noise_fn=noise_fn)
    return jnp.sin(ddpm.p_sample_loop(None, schedule, denoise_fn, x_T.shape, **policy)).sum()


def random_params(width):
    rng = np.random.default_rng(0)
    return {"in": rng.normal(size=(3, width)), "out": rng.normal(size=(width, 3)) / width**0.5}


def test_gradient_is_that_of_finite_differences():
    """To x_T and to the network's parameters."""
    value = jax.jit(partial(outcome, SHORT, ddpm.ancestral()))
    arguments = random_params(8), np.random.default_rng(1).normal(size=(2, 4, 3))
    check_grads(value, arguments, order=1, modes=["rev"], atol=1e-6, rtol=1e-6, eps=1e-4)


def test_memory_of_the_gradient_is_a_state_a_step():
    """Not the 64 times wider activations of the network, which are computed again on the way."""
    params, x_T = random_params(3 * 64), np.zeros((2, 64, 3))

    def temporary_bytes(steps):
        schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, steps))
        gradient = jax.jit(jax.grad(partial(outcome, schedule, ddpm.ancestral()), argnums=(0, 1)))
        return gradient.lower(params, x_T).compile().memory_analysis().temp_size_in_bytes

    a_step = (temporary_bytes(200) - temporary_bytes(20)) / 180
    assert x_T.nbytes / 2 < a_step < 4 * x_T.nbytes


@pytest.mark.parametrize(
    ("betas", "spacing", "right"),
    [
        (ddpm.linear_beta_schedule(200), "trailing", False),  # the tutorial's
        (ddpm.linear_beta_schedule(200, 5e-4, 0.1), "trailing", True),  # its β by 1000 / T
        (ddpm.cosine_beta_schedule(200), "trailing", True),
        (ddpm.cosine_beta_schedule(200), "leading", False),
    ],
)
def test_a_chain_that_does_not_start_in_noise_warns(key, betas, spacing, right, network):
    """Its samples have a wrong brightness."""
    chain = ddpm.respace(ddpm.make_schedule(betas), ddpm.spaced_timesteps(200, 10, spacing))
    with warnings.catch_warnings(record=True, action="always") as warned:
        jax.eval_shape(lambda: ddpm.p_sample_loop(key, chain, network, SHAPE))
    assert right != any("the chain starts from pure noise" in str(w.message) for w in warned)


COSINE = ddpm.make_schedule(ddpm.cosine_beta_schedule(1000))  # 1/√ᾱ reaches 2e4


def grey(x, t):
    """The best ε for pixels N(0.3, 0.5²), computed in float32 from what the network sees."""
    a = jnp.asarray(COSINE.alphas_cumprod, jnp.float32)[t][:, None]
    gap = x.astype(jnp.float32) - 0.3 * jnp.sqrt(a)
    return (jnp.sqrt(1 - a) * gap / (1 - 0.75 * a)).astype(x.dtype)


@jax.jit
def all_that_computes(key, x):
    chain, rule = (key, COSINE, grey), {"sampler": ddpm.dpm_solver_pp(3)}
    draw = partial(ddpm.p_sample_loop, *chain, x.shape)
    state = ddpm.p_sample_init(key, COSINE, x.shape, x_T=x, **rule)
    for _ in range(2):
        state = ddpm.p_sample_steps(*chain, state, 500, **rule)
    return {
        "not clipped": draw(x_T=x, sampler=ddpm.ddim(), clip_denoised=False),
        "in pieces": state.x_t,
        "edited": ddpm.image_to_image(*chain, x, 900, sampler=ddpm.heun()),
        "up again": draw(x_T=ddpm.ddim_invert(COSINE, grey, x / 4)),
        "between": ddpm.interpolate(COSINE, grey, x, -x, [0.3])[0],
        "inpainted": ddpm.inpaint(*chain, x, x > 0, resamples=1),
        "bits": ddpm.bits_per_dim(*chain, x).total / 4,
        "far": ddpm.slerp(100 * x, 100 * x[::-1], 0.3) / 100,
    }


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_sixteen_bits_are_computed_in_float32(key, dtype):
    """Else 1/√ᾱ is infinite in float16, and short steps of a long chain are rounded away."""
    start = np.random.default_rng(0).normal(size=(4, 16)).astype(np.float16)
    expected = all_that_computes(key, start.astype(np.float32))
    if dtype == jnp.bfloat16:  # too coarse for the ε of the first steps, unless x̂_0 is clipped
        del expected["not clipped"]
    got = all_that_computes(key, jnp.asarray(start, dtype))
    for name, value in expected.items():
        assert got[name].dtype == dtype
        error = np.abs(np.asarray(got[name], np.float32) - value).max()
        assert error < 8 * float(jnp.finfo(dtype).eps) * max(1, np.abs(value).max()), name
