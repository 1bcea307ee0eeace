"""The sections of `python -m benchmarks`, each a function that returns rows; `full`: more batches.

Steps of a chain cost the same, so chains are the last few steps of whole ones. A timed run takes
0.3 s or more: the first touch of memory, which a run pays once, has to be small beside it.
"""

import itertools
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import patch

import jax
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.contenders import CIFAR10, TUTORIAL
from benchmarks.harness import Contender, Row, interleave, race, say
from jax_ddpm import runs
from jax_ddpm.data import Dataset
from jax_ddpm.runs.programs import fit_programs
from jax_ddpm.runs.resume import on_host
from jax_ddpm.runs.training import new_run, save
from jax_ddpm.training.hosts import gather_to_writer
from jax_ddpm.training.sharding import device_mesh

_TINY = (1, 8, 8, 3)
_PEAK_BATCH, _PEAK_SIDE = 16, 2048


def sampling(full: bool) -> list[Row]:
    """The tutorial's loop; x_0 within 1e-4, measured 1e-6."""
    steps = {1: 120, 4: 30, 16: 7} | ({64: 5} if full else {})
    return _races(TUTORIAL, sides.jax_loop, sides.torch_loop, steps, 1e-4, rounds=5)


def training(full: bool) -> list[Row]:
    """The tutorial's step; losses within 1e-3, as `parity` allows Adam, measured 4e-5."""
    steps = {4: 24, 16: 6} | ({64: 3} if full else {})
    return _races(TUTORIAL, sides.jax_training, sides.torch_training, steps, 1e-3, rounds=5)


def cifar10_sampling(full: bool) -> list[Row]:
    """The loop of `ddpm_cifar10`; x_0 within 1e-3, as `parity` allows, measured 6e-5."""
    steps, rounds = {1: 20, 4: 5} | ({16: 4} if full else {}), 4 if full else 3
    return _races(CIFAR10, partial(sides.jax_loop, clip=True), _pipeline, steps, 1e-3, rounds)


def cifar10_training(full: bool) -> list[Row]:
    """The step of `ddpm_cifar10`; losses within 1e-3."""
    steps, rounds = {4: 4} | ({8: 4} if full else {}), 4 if full else 3
    return _races(CIFAR10, sides.jax_training, sides.torch_training, steps, 1e-3, rounds)


def _races(
    network: sides.Network,
    ours: Callable[..., Contender],
    theirs: Callable[..., Contender],
    steps_of: Mapping[int, int],
    tolerance: float,
    rounds: int,
) -> list[Row]:
    """A race for each batch size, with its steps."""
    rows = []
    for batch, steps in steps_of.items():
        say(f"{network.name}, batch {batch} …")
        contenders = {
            name: ours(network, steps, batch, sharding)
            for name, sharding in sides.jax_contenders(batch).items()
        } | {
            name: theirs(network, steps, batch, *each)
            for name, each in sides.torch_contenders(large=network is CIFAR10).items()
        }
        rows += race(contenders, batch, steps, tolerance, rounds)
    return rows


def _pipeline(
    network: sides.Network, steps: int, batch: int, channels_last: bool, wrap: sides.Wrap
) -> Contender:
    """The loop of diffusers' `DDPMPipeline`, over the last of its timesteps."""
    module = wrap(network.torch_module(channels_last))

    @torch.no_grad()
    def loop(noise_fn: sides.NoiseFn) -> Tensor:
        scheduler, x, t = scheduling_ddpm.DDPMScheduler(1000), noise_fn(steps), steps
        with patch.object(scheduling_ddpm, "randn_tensor", lambda *_, **__: noise_fn(t)):
            for t in reversed(range(steps)):
                x = scheduler.step(module(x, t).sample, t, x).prev_sample  # pyright: ignore
        sides.synchronize()
        return x

    return sides.loop_contender(loop, network, batch, channels_last)


def overhead(full: bool) -> list[Row]:
    """The whole loop around a network that does nothing, each side drawing its noise.

    With noise (Ho et al.'s chain), nearly all of the time goes into drawing it; DDIM draws none.
    """
    steps, key = 1000, jax.random.key(0)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(steps))

    def scan(**policy):
        nothing = lambda x, t: x  # noqa: E731
        loop = jax.jit(lambda key: ddpm.p_sample_loop(key, schedule, nothing, _TINY, **policy))
        return lambda: jax.block_until_ready(loop(key))

    @torch.no_grad()
    def theirs(scheduler) -> None:
        x = torch.randn(_TINY)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = scheduler.step(x, t, x).prev_sample

    runs = {
        "JAX, one scan": scan(),
        "JAX, one scan, DDIM": scan(sampler=ddpm.ddim()),
        "diffusers DDPMScheduler.step": partial(theirs, scheduling_ddpm.DDPMScheduler(steps)),
        "diffusers DDIMScheduler.step": partial(theirs, DDIMScheduler(steps)),
    }
    say(f"overhead: {steps:,} steps of a network that does nothing …")
    return [
        {"what": "without noise" if "DDIM" in name else "with noise", "contender": name}
        | {"seconds_per_step": [each / steps for each in seconds]}
        for name, seconds in interleave(runs, 5).items()
    ]


def peak(full: bool) -> list[Row]:
    """The tutorial's loop at batch 16 and a product of two square matrices, in turns.

    The loop's work is that of its convolutions, two FLOPs for a multiply and add.
    """
    steps = 7
    name, sharding = list(sides.jax_contenders(_PEAK_BATCH).items())[-1]
    loop = sides.jax_loop(TUTORIAL, steps, _PEAK_BATCH, sharding)
    matrix = torch.randn(_PEAK_SIDE, _PEAK_SIDE)
    say("share of the sgemm peak …")
    times = interleave({"sgemm": lambda: matrix @ matrix, name: loop.run}, 5)
    channels, size = (3, 64, 128, 64, 3), TUTORIAL.image_shape[0]
    taps = sum(9 * a * b for a, b in zip(channels, channels[1:], strict=False))
    work = {"sgemm": 2 * _PEAK_SIDE**3 / 1e9, name: 2 * taps * size**2 * _PEAK_BATCH * steps / 1e9}
    return [
        {"contender": name, "batch": _PEAK_BATCH, "gflop": work[name]}
        | {"gflop_per_second": [work[name] / each for each in seconds]}
        for name, seconds in times.items()
    ]


def checkpoints(full: bool) -> list[Row]:
    """The steps between two checkpoints by default, with a save among them and without."""
    settings = runs.Settings()
    steps, batch = settings.checkpoint_every, settings.batched()
    images = np.random.default_rng(0).uniform(-1, 1, (batch, 8, 8, 1)).astype(np.float32)
    labels = np.arange(batch, dtype=np.int32) % 10
    run = new_run(settings, Dataset(images, labels))
    programs = fit_programs(run, settings, device_mesh(batch), jax.random.key(2))
    state = programs.init(jax.device_get(run.variables))
    batches = {"images": images[None], "labels": labels[None]}
    batches = jax.device_put(batches, programs.batch_sharding)
    numbers = itertools.count()

    def train():
        nonlocal state
        for _ in range(steps):
            state, _ = programs.advance(state, batches)
        jax.block_until_ready(state)

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as thread:

        def train_and_save():
            trees, key = on_host(state, gather_to_writer)
            what = Path(folder), settings, next(numbers), trees, {"key": key}, None
            writing = thread.submit(save, *what)
            train()
            writing.result()

        say(f"checkpoints: {steps} steps …")
        times = interleave({"without": train, "JAX, with": train_and_save}, 4 if full else 3)
    return [
        {"contender": name, "batch": batch, "steps": steps, "seconds": seconds}
        for name, seconds in times.items()
    ]


def growth(full: bool) -> list[Row]:
    """The tutorial's loop at batch 4, compiled for each T: nothing but its time should grow."""
    rows = []
    for timesteps in (10, 100, 1000):
        loop = sides.jax_loop(TUTORIAL._replace(timesteps=timesteps), timesteps, 4)
        row: Row = {"timesteps": timesteps, "compile_s": loop.compile_s}
        row["program_lines"] = len(loop.program.as_text().splitlines())
        row["temporary_bytes"] = loop.program.memory_analysis().temp_size_in_bytes
        rows.append(row)
    return rows


def scaling(full: bool) -> list[Row]:
    """Time against one size: a straight line is right, since a step costs the same.

    Devices: the same 16 images over more of them (strong), or 8 images for each (weak).
    """
    counts = [n for n in (1, 2, 4, 8, 16) if n <= jax.device_count()]

    def loop(devices: int, batch: int, size: int = 32, steps: int = 5) -> Contender:
        network = TUTORIAL._replace(image_shape=(size, size, 3))
        return sides.jax_loop(network, steps, batch, sides.over_cores(batch, devices))

    def train(devices: int, batch: int) -> Contender:
        network = TUTORIAL._replace(image_shape=(32, 32, 3))
        return sides.jax_training(network, 1, batch, sides.over_cores(batch, devices))

    points = {("image size", size): loop(counts[-1], 16, size=size) for size in (16, 32, 64)}
    points |= {("batch", batch): loop(counts[-1], batch) for batch in (2, 4, 8, 16, 32)}
    points |= {("steps", n): loop(counts[-1], 16, steps=n) for n in (5, 10, 20, 40)}
    for work, build in {"sampling": loop, "training": train}.items():
        points |= {(f"{work} on devices, strong", n): build(n, 16) for n in counts}
        points |= {(f"{work} on devices, weak", n): build(n, 8 * n) for n in counts}
    say(f"scaling: {len(points)} points …")
    times = interleave({str(point): each.run for point, each in points.items()}, 5)
    return [
        {"curve": curve, "size": size, "seconds": times[str((curve, size))]}
        for curve, size in points
    ]
