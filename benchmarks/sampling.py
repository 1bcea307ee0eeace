"""The tutorial's reverse loop: milliseconds for each step.

The chain is the last `sampling_steps` steps of the tutorial's 200, since every step costs the
same. What is compared is what is timed: torch is handed the very noise that JAX's loop draws.
For the times, each side draws its own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import NamedSharding, PartitionSpec
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.compare import check_agreement
from benchmarks.settings import Settings
from benchmarks.timing import interleave, timed
from torch_reference.schedule import T, tables

__all__ = ["TOLERANCE", "run", "torch_run", "torch_step"]

TOLERANCE = 1e-4
"""Of x_0 after the short chain, float32; measured 1e-6."""


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if outputs differ."""
    rows = []
    for batch in settings.sampling_batches:
        rows += _run_batch(settings, batch, log)
    return rows


def _run_batch(settings: Settings, batch: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    steps, size = settings.sampling_steps, settings.image_size
    key = jax.random.key(0)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    schedule = ddpm.respace(schedule, np.arange(steps))
    shape = (batch, size, size, 3)

    outputs: dict[str, np.ndarray] = {}
    runs: dict[str, Callable[[], object]] = {}
    compile_s: dict[str, float | None] = {}

    shardings: dict[str, NamedSharding | None] = {sides.JAX_PLAIN: None}
    if sharding := sides.data_sharding(batch):
        shardings[sides.JAX_SHARDED] = sharding
    else:
        log(f"sampling, batch {batch}: not sharded (one device, or a batch that cannot be split)")

    for name, sharding in shardings.items():
        place = jax.devices()[0]
        if sharding is not None:
            place = NamedSharding(sharding.mesh, PartitionSpec())
        arguments = jax.device_put((key, sides.jax_variables()), place)
        loop = jax.jit(partial(_jax_loop, schedule, shape, sharding))
        program, compile_s[name] = timed(lambda loop=loop, a=arguments: loop.lower(*a).compile())
        runs[name] = lambda program=program, a=arguments: jax.block_until_ready(program(*a))
        outputs[name] = np.asarray(runs[name]())

    x_T, *noise = (ddpm.sample_noise(key, i, shape) for i in reversed(range(steps + 1)))
    for name, (channels_last, wrap) in sides.torch_contenders().items():
        step = wrap(torch_step(sides.torch_network(channels_last)))
        convert = partial(sides.nchw, channels_last=channels_last)
        given = [convert(draw) for draw in noise]
        out, seconds = timed(partial(_torch_loop, step, convert(x_T), given.__getitem__, steps))
        outputs[name] = sides.nhwc(out)
        compile_s[name] = seconds if name.startswith("torch.compile") else None
        runs[name] = partial(torch_run, step, batch, size, channels_last, steps)

    differences = check_agreement(outputs, sides.REFERENCE, TOLERANCE)
    log(f"sampling, batch {batch}: same x_0 to {max(differences.values()):.1e}; timing …")
    times = interleave(runs, settings.rounds)
    devices = {name: sides.devices_of(shardings.get(name)) for name in runs}
    return sides.rows(batch, steps, times, devices, differences, compile_s)


def _jax_loop(schedule, shape, sharding, key, variables):
    return ddpm.p_sample_loop(
        key,
        schedule,
        partial(sides.apply_fn, variables),
        shape,
        clip_denoised=False,
        sharding=sharding,
    )


def torch_step(network: torch.nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    # `torch_reference.sampling.sample_timestep` in a form that torch.compile takes whole: it
    # never looks at the value of t (the last step's variance is zero), and gathers on the device.
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


def torch_run(step, batch: int, size: int, channels_last: bool, steps: int) -> Tensor:
    def noise_fn(number: int) -> Tensor:
        return sides.draw(batch, size, channels_last)

    return _torch_loop(step, sides.draw(batch, size, channels_last), noise_fn, steps)
