"""How much of what the cores can do at best, a large matrix product, does the tutorial's loop do?

The two take turns. The loop's work is that of its convolutions, two FLOPs for a multiply and add.
"""

from collections.abc import Callable
from typing import Any

import jax
import torch

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.settings import Settings
from benchmarks.timing import interleave
from torch_reference.schedule import T

__all__ = ["run"]

_BATCH, _SIDE = 16, 2048


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time a product of two square matrices, torch's, and the loop at batch 16."""
    steps = max(5, settings.sampling_steps // _BATCH)
    schedule = ddpm.respace(ddpm.make_schedule(ddpm.linear_beta_schedule(T)), range(steps))
    name, sharding = list(sides.jax_contenders(_BATCH).items())[-1]
    shape = (_BATCH, *sides.TUTORIAL.image_shape)
    matrix = torch.randn(_SIDE, _SIDE)
    log("share of the sgemm peak …")
    runs = {
        "sgemm": lambda: matrix @ matrix,
        name: sides.jax_loop(jax.random.key(0), sides.TUTORIAL, schedule, shape, sharding),
    }
    times = interleave(runs, settings.rounds)
    channels = (3, 64, 128, 64, 3)
    taps = sum(9 * a * b for a, b in zip(channels, channels[1:], strict=False))
    flops = [2 * _SIDE**3, 2 * taps * shape[1] * shape[2] * _BATCH * steps]
    return [
        {
            "contender": name,
            "batch": _BATCH,
            "gflop": flop / 1e9,
            "gflop_per_second": [flop / 1e9 / seconds for seconds in times[name]],
        }
        for (name, flop) in zip(runs, flops, strict=True)
    ]
