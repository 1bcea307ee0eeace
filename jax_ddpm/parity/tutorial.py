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
from jax_ddpm.parity.compare import Pair
from jax_ddpm.parity.harness import Case, DType, both, images, schedule, timesteps, to_torch
from jax_ddpm.training import draw_step
from torch_reference.forward import q_sample
from torch_reference.schedule import T, tables

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


def _pair(setting: Setting, batch: int, dtype: DType) -> Pair:
    """The torch network at the tutorial's own initialisation, and the one in Flax."""
    ours, theirs = both("SimpleUNet")
    with torch.random.fork_rng():
        torch.manual_seed(42)
        reference = theirs()
    model = ours(param_dtype=jnp.dtype(dtype), **setting.fields)
    inputs = images(0, dtype, (batch, setting.size, setting.size, 3)), timesteps(T, batch)
    return Pair(
        reference, model.apply, simple_unet_from_torch, inputs, dtype, oracle=setting.oracle
    )


def _training(setting: Setting, pair: Pair) -> tuple[Any, Any]:
    """Adam at the tutorial's rate with an average of the weights, on the same draws."""
    reference, average = pair.module, copy.deepcopy(pair.module).requires_grad_(False)
    torch_optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, eps=setting.adam_eps)
    optimizer = optax.adam(1e-3, eps=setting.adam_eps)
    state = ddpm.init_train_state(jax.random.key(42), pair.variables, optimizer)
    train_step = ddpm.make_train_step(schedule(), pair.apply, optimizer, ema_decay=_EMA_DECAY)
    train_step = jax.jit(train_step, donate_argnums=0)
    draw = jax.jit(lambda state, batch: draw_step(state, schedule(), batch))
    x_start = pair.inputs[0]
    losses, expected_losses = [], []
    for _ in range(setting.adam_steps):
        drawn = draw(state, x_start)
        state, metrics = train_step(state, x_start)
        losses.append(metrics["loss"])

        x_0, t, noise = (to_torch(each, pair.oracle) for each in (x_start, *drawn))
        x_t = q_sample(tables(noise.dtype), x_0, t, noise)
        torch_optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(noise, reference(x_t, t))
        loss.backward()
        torch_optimizer.step()
        expected_losses.append(loss.item())
        for mean, value in zip(average.parameters(), reference.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - _EMA_DECAY)
    expected = [pair.converted(each.state_dict()) for each in (reference, average)]
    ours = [state.params, state.ema_params, np.stack(losses)]
    return ours, [*expected, np.asarray(expected_losses)]


def tutorial_cases(setting: Setting) -> tuple[Case, ...]:
    """Everything that depends on how the network computes."""

    def case(kind: str, name: str, compare: Callable[[Pair], Any], batch: int = 4) -> Case:
        return Case(kind, name, lambda dtype: compare(_pair(setting, batch, dtype)))

    return (
        case("forward", "SimpleUNet: output", Pair.outputs),
        case("gradients", "SimpleUNet: gradient of every parameter", Pair.gradients),
        case(
            "training",
            f"{setting.adam_steps} Adam steps: weights, EMA, losses",
            partial(_training, setting),
        ),
        case("chain", f"reverse chain: each of {T} states", Pair.chain, batch=2),
    )


TUTORIAL_CASES = (
    Case(
        "weights",
        "SimpleUNet: torch → Flax → torch",
        lambda dtype: _pair(Setting(), 4, dtype).round_trip(simple_unet_to_torch),
    ),
    *tutorial_cases(Setting()),
)
