"""The reverse loop: its time against torch's, its overhead, its rate, and the size of its program.

    sampling            the tutorial's loop, milliseconds for each step
    cifar10_sampling    `ddpm_cifar10`, 35.7 M parameters, against the loop of diffusers' pipeline
    overhead            what a step costs beyond the network
    peak                the tutorial's loop in FLOP/s, beside a large matrix product
    growth              what the compiled loop costs against the length of the chain

Every step costs the same, so the chains are the last few steps of the whole ones. What is compared
is what is timed: torch is handed the very noise that JAX's loop draws. For the times, each side
draws its own.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from unittest.mock import patch

import jax
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.harness import Log, Race, Row, Settings, interleave, timed
from benchmarks.networks import CIFAR10, TUTORIAL, Network

__all__ = ["cifar10_sampling", "growth", "overhead", "peak", "sampling"]

TOLERANCE = 1e-4
"""Of x_0 after the tutorial's short chain, float32; measured 1e-6."""

CIFAR10_TOLERANCE = 1e-3
"""Of x_0 after the chain, float32, as `parity/tolerances.py` allows; measured 6e-5."""

_TINY = (1, 8, 8, 3)
_PEAK_BATCH, _PEAK_SIDE = 16, 2048


def sampling(settings: Settings, log: Log = print) -> list[Row]:
    """Time the tutorial's loop at every batch size; raises `Disagreement` if outputs differ."""
    rows = []
    for batch in settings.sampling_batches:
        steps = max(5, settings.sampling_steps // batch)
        race = Race(f"tutorial loop, batch {batch}", sides.REFERENCE, TOLERANCE, log)
        noise = _enter_jax(race, TUTORIAL, sides.chain(steps), batch, clip_denoised=False)
        for name, (channels_last, wrap) in sides.torch_contenders().items():
            step = wrap(sides.torch_step(TUTORIAL.torch_module(channels_last)))
            loop = partial(sides.torch_loop, step, steps=steps)
            given = _for_torch(noise, channels_last).__getitem__
            out, seconds = timed(partial(loop, given))
            own = partial(_draw, batch, 64, channels_last)
            race.enter(name, partial(loop, own), sides.nhwc(out), seconds)
        rows += race.run(batch, steps, settings.rounds)
    return rows


def cifar10_sampling(settings: Settings, log: Log = print) -> list[Row]:
    """Time the large loop at every batch size; raises `Disagreement` if outputs differ."""
    rows = []
    for batch in settings.cifar10_sampling_batches:
        steps = max(4, settings.cifar10_steps // batch)
        race = Race(f"ddpm_cifar10 loop, batch {batch}", sides.REFERENCE, CIFAR10_TOLERANCE, log)
        noise = _enter_jax(race, CIFAR10, sides.chain(steps, 1000), batch)
        for name, (channels_last, wrap) in sides.torch_contenders(large=True).items():
            network = wrap(CIFAR10.torch_module(channels_last))
            loop = partial(_pipeline_loop, scheduling_ddpm.DDPMScheduler(1000), network, steps)
            given = _for_torch(noise, channels_last).__getitem__
            out, seconds = timed(partial(loop, given, handed=True))
            own = partial(_draw, batch, 32, channels_last)
            race.enter(name, partial(loop, own), sides.nhwc(out), seconds)
        rows += race.run(batch, steps, settings.cifar10_rounds)
    return rows


def _enter_jax(
    race: Race, network: Network, schedule: ddpm.NoiseSchedule, batch: int, **policy: bool
) -> list[jax.Array]:
    """Enter JAX's loops of the whole `schedule`; what they draw at each entry, at the last x_T."""
    shape = (batch, *network.image_shape)
    for name, sharding in sides.jax_contenders(batch).items():
        compiling = partial(sides.jax_loop, network, schedule, shape, sharding, **policy)
        loop, seconds = timed(compiling)
        race.enter(name, loop, np.asarray(loop()), seconds, sharding)
    entries = range(schedule.num_timesteps + 1)
    return [ddpm.sample_noise(jax.random.key(0), entry, shape) for entry in entries]


def _for_torch(noise: list[jax.Array], channels_last: bool) -> list[Tensor]:
    return [sides.nchw(each, channels_last) for each in noise]


def _draw(batch: int, size: int, channels_last: bool, entry: int) -> Tensor:
    return sides.draw(batch, size, channels_last)


@torch.no_grad()
def _pipeline_loop(
    scheduler: scheduling_ddpm.DDPMScheduler,
    network: Callable,
    steps: int,
    noise_fn: Callable[[int], Tensor],
    handed: bool = False,
) -> Tensor:
    """What `DDPMPipeline` runs, for the last `steps` of its timesteps, from `noise_fn(steps)`.

    The scheduler draws its own noise, unless it is `handed` that of `noise_fn`.
    """

    def hand(t: int) -> AbstractContextManager:
        return patch.object(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise_fn(t))

    x = noise_fn(steps)
    for t in reversed(range(steps)):
        output = network(x, t).sample
        with hand(t) if handed else nullcontext():
            x = scheduler.step(output, t, x).prev_sample  # pyright: ignore
    sides.synchronize()
    return x


def overhead(settings: Settings, log: Log = print) -> list[Row]:
    """Time the whole loop around a network that does nothing, each side drawing its noise.

    One image of 8×8×3, `overhead_steps` steps; with noise (Ho et al.'s chain) and without (DDIM).
    With noise, nearly all of the time goes into drawing it.
    """
    steps, key = settings.overhead_steps, jax.random.key(0)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(steps))

    def nothing(x, t):
        return x

    def scan(**policy):
        loop = jax.jit(lambda key: ddpm.p_sample_loop(key, schedule, nothing, _TINY, **policy))
        return lambda: jax.block_until_ready(loop(key))

    stepwise = jax.jit(lambda state: ddpm.p_sample_steps(key, schedule, nothing, state, 1))
    state = ddpm.p_sample_init(key, schedule, _TINY)
    for _ in range(steps):
        state = stepwise(state)
    np.testing.assert_allclose(state.x_t, scan()(), atol=1e-6)

    runs = {
        "JAX, one scan": scan(),
        "JAX, one scan, DDIM": scan(sampler=ddpm.ddim()),
        "diffusers DDPMScheduler.step": partial(
            _scheduler_loop, scheduling_ddpm.DDPMScheduler(steps)
        ),
        "diffusers DDIMScheduler.step": partial(_scheduler_loop, DDIMScheduler(steps)),
    }
    log(f"overhead: {steps:,} steps of a network that does nothing …")
    times = interleave(runs, settings.rounds)
    return [
        {"contender": name, "seconds_per_step": [seconds / steps for seconds in times[name]]}
        for name in runs
    ]


@torch.no_grad()
def _scheduler_loop(scheduler) -> Tensor:
    x = torch.randn(_TINY)
    scheduler.set_timesteps(len(scheduler.betas))
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    return x


def peak(settings: Settings, log: Log = print) -> list[Row]:
    """Time the tutorial's loop at batch 16 and a product of two square matrices, in turns.

    The loop's work is that of its convolutions, two FLOPs for a multiply and add.
    """
    steps = max(5, settings.sampling_steps // _PEAK_BATCH)
    name, sharding = list(sides.jax_contenders(_PEAK_BATCH).items())[-1]
    _, size, *_ = shape = (_PEAK_BATCH, *TUTORIAL.image_shape)
    matrix = torch.randn(_PEAK_SIDE, _PEAK_SIDE)
    log("share of the sgemm peak …")
    runs = {
        "sgemm": lambda: matrix @ matrix,
        name: sides.jax_loop(TUTORIAL, sides.chain(steps), shape, sharding),
    }
    times = interleave(runs, settings.rounds)
    channels = (3, 64, 128, 64, 3)
    taps = sum(9 * a * b for a, b in zip(channels, channels[1:], strict=False))
    flops = [2 * _PEAK_SIDE**3, 2 * taps * size**2 * _PEAK_BATCH * steps]
    return [
        {
            "contender": name,
            "batch": _PEAK_BATCH,
            "gflop": flop / 1e9,
            "gflop_per_second": [flop / 1e9 / seconds for seconds in times[name]],
        }
        for name, flop in zip(runs, flops, strict=True)
    ]


def growth(settings: Settings, log: Log = print) -> list[Row]:
    """Compile the tutorial's loop at batch 4 for each T: nothing but its time should grow."""
    rows = []
    for timesteps in settings.chain_lengths:
        rows.append(_compile(timesteps))
        log(f"program for T = {timesteps:,}: {rows[-1]['compile_s']:.1f} s to compile")
    return rows


def _compile(timesteps: int) -> Row:
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(timesteps))
    loop = sides.reverse_loop(TUTORIAL, schedule, (4, *TUTORIAL.image_shape))
    arguments = jax.random.key(0), TUTORIAL.variables()
    program, seconds = timed(lambda: loop.lower(*arguments).compile())
    return {
        "timesteps": timesteps,
        "compile_s": seconds,
        "program_lines": len(program.as_text().splitlines()),
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }
