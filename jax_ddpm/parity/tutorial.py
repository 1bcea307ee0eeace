"""Cases for the tutorial's network: weights, output, gradients, training, the whole chain.

Both sides compute in the dtype under test, and start from the same torch weights.
"""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jax_ddpm as ddpm
from jax_ddpm.interop import simple_unet_from_torch, simple_unet_to_torch
from jax_ddpm.parity.harness import Case, DType, both, from_torch, images, timesteps, to_torch
from jax_ddpm.training import draw_step
from torch_reference.sampling import sample
from torch_reference.schedule import T, tables

__all__ = ["TUTORIAL_CASES"]

_SHAPE = (4, 8, 8, 3)
_STEPS = 100
_EMA_DECAY = 0.99


def _networks(dtype: DType):
    """The torch network at the tutorial's own initialisation, and its twin with its weights."""
    ours, theirs = both("SimpleUNet")
    with torch.random.fork_rng():
        torch.manual_seed(42)
        reference = theirs().to(getattr(torch, dtype))
    model = ours(param_dtype=jnp.dtype(dtype), precision="highest")
    return model, simple_unet_from_torch(reference.state_dict()), reference


def _schedule() -> ddpm.NoiseSchedule:
    return ddpm.make_schedule(ddpm.linear_beta_schedule(T))


def _round_trip(dtype: DType):
    _, variables, reference = _networks(dtype)
    theirs = {name: value.numpy() for name, value in reference.state_dict().items()}
    return simple_unet_to_torch(jax.tree.map(jnp.asarray, variables)), theirs


def _forward(dtype: DType):
    model, variables, reference = _networks(dtype)
    x, t = images(0, dtype, _SHAPE), timesteps(T, 4)
    with torch.no_grad():
        expected = reference(to_torch(x), to_torch(t).long())
    return jax.jit(model.apply)(variables, x, t), from_torch(expected)


def _gradients(dtype: DType):
    model, variables, reference = _networks(dtype)
    x, t, noise = images(0, dtype, _SHAPE), timesteps(T, 4), images(1, dtype, _SHAPE)

    def loss_fn(variables):
        return jnp.mean((noise - model.apply(variables, x, t)) ** 2)

    loss = torch.nn.functional.mse_loss(to_torch(noise), reference(to_torch(x), to_torch(t).long()))
    loss.backward()
    expected = {name: value.grad.numpy() for name, value in reference.named_parameters()}
    return simple_unet_to_torch(jax.jit(jax.grad(loss_fn))(variables)), expected


def _training(dtype: DType):
    """Adam at the tutorial's rate with an average of the weights, on the same draws."""
    model, variables, reference = _networks(dtype)
    average = copy.deepcopy(reference).requires_grad_(False)
    torch_optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3)
    schedule, optimizer = _schedule(), optax.adam(1e-3)
    state = ddpm.init_train_state(jax.random.key(42), variables, optimizer)
    train_step = jax.jit(
        ddpm.make_train_step(schedule, model.apply, optimizer, ema_decay=_EMA_DECAY),
        donate_argnums=0,
    )
    draw = jax.jit(lambda state, batch: draw_step(state, schedule, batch))
    q_sample = both("q_sample")[1]
    x_start = images(0, dtype, _SHAPE)
    losses, expected_losses = [], []
    for _ in range(_STEPS):
        t, noise = draw(state, x_start)
        state, metrics = train_step(state, x_start)
        losses.append(metrics["loss"])

        t, noise = to_torch(t).long(), to_torch(noise)
        x_t = q_sample(tables(noise.dtype), to_torch(x_start), t, noise)
        torch_optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(noise, reference(x_t, t))
        loss.backward()
        torch_optimizer.step()
        expected_losses.append(loss.item())
        with torch.no_grad():
            for mean, value in zip(average.parameters(), reference.parameters(), strict=True):
                mean.mul_(_EMA_DECAY).add_(value, alpha=1 - _EMA_DECAY)
    ours = (
        simple_unet_to_torch(state.params),
        simple_unet_to_torch(state.ema_params),
        np.stack(losses),
    )
    theirs = (
        {name: value.numpy() for name, value in reference.state_dict().items()},
        {name: value.numpy() for name, value in average.state_dict().items()},
        np.asarray(expected_losses),
    )
    return ours, theirs


def _chain(dtype: DType):
    """Every state of the reverse chain, each a leaf of its own with its own scale."""
    model, variables, reference = _networks(dtype)
    shape = (2, *_SHAPE[1:])
    x_T, noise = images(0, dtype, shape), images(1, dtype, (T, *shape))

    def loop(variables, noise):
        return ddpm.p_sample_loop(
            None,
            _schedule(),
            lambda x_t, t: model.apply(variables, x_t, t),
            shape,
            x_T=x_T,
            noise_fn=lambda i: noise[i],
            clip_denoised=False,
            save_every=1,
        )

    states = jax.jit(loop)(variables, noise)[1]
    expected = sample(reference, to_torch(x_T), lambda i: to_torch(noise[i]))
    return list(states), list(map(from_torch, expected))


TUTORIAL_CASES = (
    Case("weights", "SimpleUNet: torch → Flax → torch", _round_trip),
    Case("forward", "SimpleUNet: output", _forward),
    Case("gradients", "SimpleUNet: gradient of every parameter", _gradients),
    Case("training", f"{_STEPS} Adam steps: weights, EMA, losses", _training),
    Case("chain", f"reverse chain: each of {T} states", _chain),
)
