"""`ddpm_cifar10`, 35.7 M parameters: the reverse loop against that of diffusers' `DDPMPipeline`.

The same random weights and, for the comparison, the same noise, which diffusers' scheduler is
handed in place of its own. A chain of few steps: each costs the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from diffusers.schedulers import scheduling_ddpm
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.sampling import enter_jax
from benchmarks.settings import Settings
from benchmarks.timing import timed

__all__ = ["run"]

TOLERANCE = 1e-3
"""Of x_0 after the chain, float32: DESIGN's number; measured 6e-5."""


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if outputs differ."""
    return [
        row
        for batch in settings.cifar10_sampling_batches
        for row in _run_batch(settings, batch, log)
    ]


def _run_batch(settings: Settings, batch: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    steps = max(4, settings.cifar10_steps // batch)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    schedule = ddpm.respace(schedule, range(steps))
    race = sides.Race(f"ddpm_cifar10 loop, batch {batch}", TOLERANCE, log)
    x_T, *noise = enter_jax(race, sides.CIFAR10, schedule, batch)

    scheduler = scheduling_ddpm.DDPMScheduler(1000)
    for name, (channels_last, wrap) in sides.torch_contenders(large=True).items():
        network = wrap(sides.CIFAR10.torch_module(channels_last))
        convert = partial(sides.nchw, channels_last=channels_last)
        given = iter([convert(draw) for draw in noise])
        loop = partial(_pipeline_loop, scheduler, network, steps)
        out, seconds = timed(partial(loop, convert(x_T), given))
        start = partial(sides.draw, batch, 32, channels_last)
        again = lambda loop=loop, start=start: loop(start(), None)  # noqa: E731
        race.enter(name, again, sides.nhwc(out), seconds)
    return race.run(batch, steps, settings.cifar10_rounds)


@torch.no_grad()
def _pipeline_loop(
    scheduler: scheduling_ddpm.DDPMScheduler,
    network: Callable,
    steps: int,
    x: Tensor,
    noise: Iterator[Tensor] | None,
) -> Tensor:
    """What `DDPMPipeline` runs, for the last `steps` of its timesteps."""
    for t in reversed(range(steps)):
        output = network(x, t).sample
        if noise is None:
            x = scheduler.step(output, t, x).prev_sample  # pyright: ignore
        else:
            draw = next(noise)
            with patch.object(scheduling_ddpm, "randn_tensor", lambda *_, d=draw, **__: d):
                x = scheduler.step(output, t, x).prev_sample  # pyright: ignore
    sides.synchronize()
    return x
