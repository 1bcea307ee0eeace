"""The whole chain has a gradient, and it costs a state a step."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
SHAPE = (2, 4, 3)


def network(params, x, t):
    """One hidden layer, and the timestep."""
    time = jnp.cos(t.astype(x.dtype) / 50).reshape(-1, 1, 1)
    hidden = jnp.tanh(jnp.einsum("bpc,ch->bph", x, params["in"]) + time)
    return jnp.einsum("bph,hc->bpc", hidden, params["out"])


def init(key, width):
    inwards, outwards = jax.random.split(key)
    return {
        "in": jax.random.normal(inwards, (3, width)),
        "out": jax.random.normal(outwards, (width, 3)) / width**0.5,
    }


def outcome(key, params, x_T, *, schedule, sampler):
    """A number made of x_0."""
    x_0 = ddpm.p_sample_loop(
        key,
        schedule,
        partial(network, params),
        x_T.shape,
        sampler=sampler,
        clip_denoised=False,
        x_T=x_T,
    )
    return jnp.sin(x_0).sum()


@pytest.mark.parametrize("sampler", [ddpm.ancestral(), ddpm.ddim()], ids=["ancestral", "ddim"])
def test_gradient_is_that_of_finite_differences(key, sampler):
    """To x_T and to the network's parameters, along a random direction of each."""
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 10, "trailing"))
    value = jax.jit(partial(outcome, key, schedule=schedule, sampler=sampler))
    arguments = init(key, 8), jax.random.normal(key, SHAPE)
    gradient = jax.jit(jax.grad(value, argnums=(0, 1)))(*arguments)
    leaves, structure = jax.tree.flatten(arguments)
    for number, leaf in enumerate(leaves):
        direction = jax.random.normal(jax.random.fold_in(key, number), leaf.shape)

        def moved(step, number=number, direction=direction):
            new = [*leaves[:number], leaves[number] + step * direction, *leaves[number + 1 :]]
            return float(value(*structure.unflatten(new)))

        # Fourth order, so that a step of 1e-3 is exact to 1e-9.
        step = 1e-3
        slope = 8 * (moved(step) - moved(-step)) - (moved(2 * step) - moved(-2 * step))
        expected = slope / (12 * step)
        found = float(jnp.vdot(jax.tree.leaves(gradient)[number], direction))
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_memory_of_the_gradient_is_a_state_a_step(key):
    """Not the 64 times wider activations of the network, which are computed again on the way."""
    params, x_T = init(key, 3 * 64), jnp.zeros((2, 64, 3))

    def temporary_bytes(steps):
        schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, steps))
        value = partial(outcome, schedule=schedule, sampler=ddpm.ancestral())
        compiled = jax.jit(jax.grad(value, argnums=(1, 2))).lower(key, params, x_T).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    a_step = (temporary_bytes(200) - temporary_bytes(20)) / 180
    assert x_T.nbytes / 2 < a_step < 4 * x_T.nbytes


@pytest.mark.parametrize("edit", ["invert", "inpaint"])
def test_editing_has_a_gradient(key, edit):
    """Of the picture that goes in."""
    schedule = ddpm.respace(SCHEDULE, ddpm.spaced_timesteps(200, 4, "trailing"))
    denoise_fn = partial(network, init(key, 8))
    mask = np.array([1.0, 0.0, 1.0])

    @jax.jit
    def value(x):
        if edit == "invert":
            return jnp.sin(ddpm.ddim_invert(schedule, denoise_fn, x)).sum()
        policy = dict(jump_length=2, resamples=2, clip_denoised=False)
        return jnp.sin(ddpm.inpaint(key, schedule, denoise_fn, x, mask, **policy)).sum()

    x, direction = jax.random.normal(key, (2, *SHAPE))
    found = float(jnp.vdot(jax.jit(jax.grad(value))(x), direction))
    step = 1e-4
    expected = float(value(x + step * direction) - value(x - step * direction)) / (2 * step)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
