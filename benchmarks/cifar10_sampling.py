"""`ddpm_cifar10`, 35.7 M parameters: the reverse loop against that of diffusers' `DDPMPipeline`.

The same random weights and, for the comparison, the same noise, which diffusers' scheduler is
handed in place of its own. A chain of few steps: each costs the same.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest.mock import patch

import jax
import numpy as np
import torch
from diffusers.schedulers import scheduling_ddpm
from jax.sharding import NamedSharding, PartitionSpec
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.compare import check_agreement
from benchmarks.settings import Settings
from benchmarks.timing import interleave, timed

__all__ = ["TOLERANCE", "run"]

TOLERANCE = 1e-3
"""Of x_0 after the chain, float32: DESIGN's number; measured 2e-5."""


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if outputs differ."""
    rows = []
    for batch in settings.cifar10_sampling_batches:
        rows += _run_batch(settings, batch, log)
    return rows


def _run_batch(settings: Settings, batch: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    steps, shape = settings.cifar10_steps, (batch, 32, 32, 3)
    key = jax.random.key(0)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    schedule = ddpm.respace(schedule, np.arange(steps))
    model, variables = sides.cifar10_jax()

    def loop(sharding, key, variables):
        def denoise_fn(x, t):
            return model.apply(variables, x, t)

        return ddpm.p_sample_loop(key, schedule, denoise_fn, shape, sharding=sharding)

    outputs, runs, compile_s = {}, {}, {}
    shardings: dict[str, NamedSharding | None] = {sides.JAX_PLAIN: None}
    if sharding := sides.data_sharding(batch):
        shardings[sides.JAX_SHARDED] = sharding
    for name, sharding in shardings.items():
        place = jax.devices()[0]
        if sharding is not None:
            place = NamedSharding(sharding.mesh, PartitionSpec())
        arguments = jax.device_put((key, variables), place)
        jitted = jax.jit(partial(loop, sharding))
        program, compile_s[name] = timed(lambda j=jitted, a=arguments: j.lower(*a).compile())
        runs[name] = lambda program=program, a=arguments: jax.block_until_ready(program(*a))
        outputs[name] = np.asarray(runs[name]())

    x_T, *noise = (ddpm.sample_noise(key, i, shape) for i in reversed(range(steps + 1)))
    scheduler = scheduling_ddpm.DDPMScheduler(1000)
    for name, (channels_last, wrap) in sides.torch_contenders(large=True).items():
        network = wrap(sides.cifar10_torch(channels_last))
        convert = partial(sides.nchw, channels_last=channels_last)
        given = iter([convert(draw) for draw in noise])
        run_torch = partial(_pipeline_loop, scheduler, network, steps)
        out, seconds = timed(partial(run_torch, convert(x_T), given))
        outputs[name] = sides.nhwc(out)
        compile_s[name] = seconds if name.startswith("torch.compile") else None
        start = partial(sides.draw, batch, 32, channels_last)
        runs[name] = lambda run_torch=run_torch, start=start: run_torch(start(), None)

    differences = check_agreement(outputs, sides.REFERENCE, TOLERANCE)
    log(f"ddpm_cifar10 loop, batch {batch}: same x_0 to {max(differences.values()):.1e}; timing …")
    times = interleave(runs, settings.cifar10_rounds)
    devices = {name: sides.devices_of(shardings.get(name)) for name in runs}
    return sides.rows(batch, steps, times, devices, differences, compile_s)


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
