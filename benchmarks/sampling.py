"""The tutorial's reverse loop: milliseconds for each step.

The chain is the last few of the tutorial's 200 steps, since every step costs the same. What is
compared is what is timed: torch is handed the very noise that JAX's loop draws. For the times, each
side draws its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.settings import Settings
from benchmarks.timing import timed
from torch_reference.schedule import T, tables

__all__ = ["enter_jax", "run", "torch_run", "torch_step"]

TOLERANCE = 1e-4
"""Of x_0 after the short chain, float32; measured 1e-6."""


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if outputs differ."""
    return [row for batch in settings.sampling_batches for row in _run_batch(settings, batch, log)]


def _run_batch(settings: Settings, batch: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    steps = max(5, settings.sampling_steps // batch)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    schedule = ddpm.respace(schedule, range(steps))
    race = sides.Race(f"tutorial loop, batch {batch}", TOLERANCE, log)
    x_T, *noise = enter_jax(race, sides.TUTORIAL, schedule, batch, clip_denoised=False)

    for name, (channels_last, wrap) in sides.torch_contenders().items():
        step = wrap(torch_step(sides.TUTORIAL.torch_module(channels_last)))
        convert = partial(sides.nchw, channels_last=channels_last)
        given = [convert(draw) for draw in noise]
        out, seconds = timed(partial(_torch_loop, step, convert(x_T), given.__getitem__, steps))
        again = partial(torch_run, step, batch, channels_last, steps)
        race.enter(name, again, sides.nhwc(out), seconds)
    return race.run(batch, steps, settings.rounds)


def enter_jax(
    race: sides.Race,
    network: sides.Network,
    schedule: ddpm.NoiseSchedule,
    batch: int,
    **policy: Any,
) -> list[jax.Array]:
    """Enter JAX's loops of the whole `schedule`; returns what they draw, x_T and then the noise."""
    key = jax.random.key(0)
    shape = (batch, *network.image_shape)
    for name, sharding in sides.jax_contenders(batch).items():
        compiling = partial(sides.jax_loop, key, network, schedule, shape, sharding, **policy)
        loop, seconds = timed(compiling)
        race.enter(name, loop, np.asarray(loop()), seconds, sharding)
    entries = reversed(range(schedule.num_timesteps + 1))
    return [ddpm.sample_noise(key, i, shape) for i in entries]


def torch_step(network: torch.nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`torch_reference.sampling.sample_timestep` in a form that torch.compile takes whole.

    It never looks at the value of t (the last step's variance is zero), and gathers on the device.
    """
    terms = tables()
    scale = terms.sqrt_recip_alphas.to(sides.torch_device())
    weight = (terms.betas / terms.sqrt_one_minus_alphas_cumprod).to(sides.torch_device())
    deviation = terms.posterior_variance.sqrt().to(sides.torch_device())

    def step(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        def at(vals: Tensor) -> Tensor:
            return vals[t][:, None, None, None]

        return at(scale) * (x - at(weight) * network(x, t)) + at(deviation) * noise

    return step


@torch.no_grad()
def _torch_loop(step, x: Tensor, noise_fn: Callable[[int], Tensor], steps: int) -> Tensor:
    for number in range(steps):
        t = torch.full((x.shape[0],), steps - 1 - number, device=x.device)
        x = step(x, t, noise_fn(number))
    sides.synchronize()
    return x


def torch_run(step, batch: int, channels_last: bool, steps: int) -> Tensor:
    """The loop with noise of torch's own."""
    size, *_ = sides.TUTORIAL.image_shape

    def noise_fn(number: int) -> Tensor:
        return sides.draw(batch, size, channels_last)

    return _torch_loop(step, sides.draw(batch, size, channels_last), noise_fn, steps)
