"""Cases for the tutorial's network: weights, output, gradients, training, the whole chain.

Both sides start from the same torch weights, and compute in the dtype under test unless a
`Setting` says otherwise.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

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

__all__ = ["TUTORIAL_CASES", "Setting", "tutorial_cases"]

_EMA_DECAY = 0.99


class Setting(NamedTuple):
    """How a comparison is made; the defaults are those of the certified table."""

    size: int = 8
    """Height and width of the images."""
    adam_steps: int = 100
    adam_eps: float = 1e-8
    """Added to √v. By default Adam makes a whole step of a gradient that is only rounding."""
    oracle: DType | None = None
    """What torch computes in; None: in the dtype under test."""
    fields: Mapping[str, Any] = {"precision": "highest"}
    """Of the JAX network: `precision`, or `dtype`."""

    def shape(self, batch: int) -> tuple[int, int, int, int]:
        return (batch, self.size, self.size, 3)


def _networks(setting: Setting, dtype: DType):
    """The torch network at the tutorial's own initialisation, and its twin with its weights."""
    ours, theirs = both("SimpleUNet")
    with torch.random.fork_rng():
        torch.manual_seed(42)
        reference = theirs().to(getattr(torch, dtype))
    model = ours(param_dtype=jnp.dtype(dtype), **setting.fields)
    variables = simple_unet_from_torch(reference.state_dict())
    return model, variables, reference.to(getattr(torch, setting.oracle or dtype))


def _to_oracle(setting: Setting, array: Any) -> torch.Tensor:
    """For torch: images in the oracle's dtype, timesteps as integers."""
    tensor = to_torch(array)
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.to(getattr(torch, setting.oracle)) if setting.oracle else tensor


def _schedule() -> ddpm.NoiseSchedule:
    return ddpm.make_schedule(ddpm.linear_beta_schedule(T))


def _round_trip(dtype: DType):
    _, variables, reference = _networks(Setting(), dtype)
    theirs = {name: value.numpy() for name, value in reference.state_dict().items()}
    return simple_unet_to_torch(jax.tree.map(jnp.asarray, variables)), theirs


def _forward(setting: Setting, dtype: DType):
    model, variables, reference = _networks(setting, dtype)
    x, t = images(0, dtype, setting.shape(4)), timesteps(T, 4)
    with torch.no_grad():
        expected = reference(_to_oracle(setting, x), _to_oracle(setting, t))
    return jax.jit(model.apply)(variables, x, t), from_torch(expected)


def _gradients(setting: Setting, dtype: DType):
    model, variables, reference = _networks(setting, dtype)
    x, noise = (images(seed, dtype, setting.shape(4)) for seed in (0, 1))
    t = timesteps(T, 4)

    def loss_fn(variables):
        return jnp.mean((noise - model.apply(variables, x, t)) ** 2)

    output = reference(_to_oracle(setting, x), _to_oracle(setting, t))
    torch.nn.functional.mse_loss(_to_oracle(setting, noise), output).backward()
    expected = {name: value.grad.numpy() for name, value in reference.named_parameters()}
    return simple_unet_to_torch(jax.jit(jax.grad(loss_fn))(variables)), expected


def _training(setting: Setting, dtype: DType):
    """Adam at the tutorial's rate with an average of the weights, on the same draws."""
    model, variables, reference = _networks(setting, dtype)
    average = copy.deepcopy(reference).requires_grad_(False)
    torch_optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, eps=setting.adam_eps)
    schedule, optimizer = _schedule(), optax.adam(1e-3, eps=setting.adam_eps)
    state = ddpm.init_train_state(jax.random.key(42), variables, optimizer)
    train_step = jax.jit(
        ddpm.make_train_step(schedule, model.apply, optimizer, ema_decay=_EMA_DECAY),
        donate_argnums=0,
    )
    draw = jax.jit(lambda state, batch: draw_step(state, schedule, batch))
    q_sample = both("q_sample")[1]
    x_start = images(0, dtype, setting.shape(4))
    losses, expected_losses = [], []
    for _ in range(setting.adam_steps):
        t, noise = draw(state, x_start)
        state, metrics = train_step(state, x_start)
        losses.append(metrics["loss"])

        t, noise = _to_oracle(setting, t), _to_oracle(setting, noise)
        x_t = q_sample(tables(noise.dtype), _to_oracle(setting, x_start), t, noise)
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


def _chain(setting: Setting, dtype: DType):
    """Every state of the reverse chain, each a leaf of its own with its own scale."""
    model, variables, reference = _networks(setting, dtype)
    shape = setting.shape(2)
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
    convert = partial(_to_oracle, setting)
    expected = sample(reference, convert(x_T), lambda i: convert(noise[i]))
    return list(states), list(map(from_torch, expected))


def tutorial_cases(setting: Setting) -> tuple[Case, ...]:
    """Everything that depends on how the network computes."""

    def case(kind: str, name: str, compare: Callable) -> Case:
        return Case(kind, name, partial(compare, setting))

    return (
        case("forward", "SimpleUNet: output", _forward),
        case("gradients", "SimpleUNet: gradient of every parameter", _gradients),
        case("training", f"{setting.adam_steps} Adam steps: weights, EMA, losses", _training),
        case("chain", f"reverse chain: each of {T} states", _chain),
    )


TUTORIAL_CASES = (
    Case("weights", "SimpleUNet: torch → Flax → torch", _round_trip),
    *tutorial_cases(Setting()),
)
