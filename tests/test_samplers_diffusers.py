"""Whole chains against diffusers, whose tables are float32: every x_t on the way."""

from functools import partial
from itertools import product

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_ddpm as ddpm

SHAPE = (2, 4, 4, 3)
TRAINING = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
X_T = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
MULTISTEP = diffusers.DPMSolverMultistepScheduler
SDE = {"algorithm_type": "sde-dpmsolver++"}
STEPWISE = {
    "ddpm": (ddpm.ancestral(), diffusers.DDPMScheduler, {"clip_sample": False}),
    "ddim": (ddpm.ddim(), diffusers.DDIMScheduler, {}),
    "ddim_half": (ddpm.ddim(0.5), diffusers.DDIMScheduler, {}),
    "dpm_2": (ddpm.dpm_solver_pp(2), MULTISTEP, {"solver_order": 2}),
    "dpm_sde_2": (ddpm.dpm_solver_pp(2, stochastic=True), MULTISTEP, {"solver_order": 2, **SDE}),
}


@jax.jit
def network(x, t):
    return jnp.tanh(x) * jnp.cos(t.astype(x.dtype) / 200).reshape(-1, 1, 1, 1)


def walk(theirs, denoise_fn, **arguments):
    """diffusers' x_t after every step from X_T, noisiest first."""
    x, states = torch.from_numpy(X_T), []
    for t in theirs.timesteps.numpy():
        output = np.array(denoise_fn(x.numpy(), np.full(2, t, np.int32)))
        x = theirs.step(torch.from_numpy(output), t, x, **arguments).prev_sample
        states.append(x.numpy())
    return np.array(states)


@partial(jax.jit, static_argnums=(0, 1), static_argnames=("prediction_type", "clip_denoised"))
def our_walk(sampler, denoise_fn, schedule, noise, **policy):
    draw = partial(ddpm.p_sample_loop, None, schedule, denoise_fn, SHAPE, x_T=X_T, save_every=1)
    return draw(sampler=sampler, noise_fn=lambda i: noise[i], **policy)[1]


# NumPy's opinion of diffusers, which hands it tensors.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize(  # DDPMScheduler always ends on x_0
    ("name", "end"), [*product(STEPWISE, ["zero"]), *product([*STEPWISE][1:], ["sigma_min"])]
)
def test_every_step_is_that_of_diffusers(name, spacing, end):
    """With the same noise, to what its float32 tables leave.

    There 1 - ᾱ, 1e-4 at t = 0, is off by 2e-4 of itself, and so λ where `sigma_min` ends by 1e-4:
    5e-6 of the largest value at worst (`dpm_sde_2`), and 2e-6 elsewhere.
    """
    sampler, kind, arguments = STEPWISE[name]
    if kind is MULTISTEP:
        arguments = arguments | {"final_sigmas_type": end, "lower_order_final": False}
    elif kind is diffusers.DDIMScheduler:
        arguments = {"clip_sample": False, "set_alpha_to_one": end == "zero"}
    theirs = kind(200, 1e-4, 0.02, timestep_spacing=spacing, **arguments)
    theirs.set_timesteps(10)
    timesteps = theirs.timesteps.numpy()
    # It draws with one generator what the other has drawn here.
    generator, twin = (torch.Generator().manual_seed(0) for _ in range(2))
    noise = np.stack([torch.randn(SHAPE, generator=twin).numpy() for _ in timesteps])[::-1]
    eta = {"eta": 0.5} if name == "ddim_half" else {}
    expected = walk(theirs, network, generator=generator, **eta)
    final = 1.0 if end == "zero" else TRAINING.alphas_cumprod[0]
    schedule = ddpm.respace(TRAINING, timesteps[::-1], final_alpha_cumprod=final)
    ours = our_walk(sampler, network, schedule, noise, clip_denoised=False)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_clipped_ddim_has_both_rules_of_diffusers(prediction_type):
    """Its default keeps the network's ε where x̂_0 is clipped; the other rule is far from it."""

    def large(x, t):  # so that x̂_0 is clipped, whatever this predicts
        return network(x, t) - 2 if prediction_type == "v_prediction" else 3 * network(x, t)

    policy = dict(prediction_type=prediction_type)
    theirs = diffusers.DDIMScheduler(200, 1e-4, 0.02, clip_sample=True, **policy)
    theirs.set_timesteps(10)
    schedule = ddpm.respace(TRAINING, theirs.timesteps.numpy()[::-1])
    expected, ours = [], []
    for clipped in (False, True):
        expected.append(walk(theirs, jax.jit(large), use_clipped_model_output=clipped))
        sampler = ddpm.ddim(use_clipped_model_output=clipped)
        ours.append(our_walk(sampler, large, schedule, np.zeros((10, *SHAPE)), **policy))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert np.abs(np.subtract(*expected)).max() > 0.1
