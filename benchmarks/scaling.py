"""Curves: the time of the tutorial's loop and training step as one size grows.

steps, image size, batch        of the loop; a straight line is right (a step costs the same)
devices, strong                 the same 16 images over more devices
devices, weak                   8 images for each device
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.harness import Log, Row, Settings, interleave
from benchmarks.networks import TUTORIAL
from jax_ddpm.training.sharding import data_sharding, device_mesh
from torch_reference.schedule import T

__all__ = ["scaling"]


def scaling(settings: Settings, log: Log = print) -> list[Row]:
    """Every point of every curve, all of them taking turns."""
    counts = [n for n in (1, 2, 4, 8, 16) if n <= jax.device_count()]
    everything = max(counts)
    steps = settings.scaling_steps
    points: dict[tuple[str, int], Callable] = {}
    for size in (16, 32, 64):
        points["image size", size] = _loop(everything, 16, size, steps)
    for batch in (2, 4, 8, 16, 32):
        points["batch", batch] = _loop(everything, batch, 32, steps)
    for length in (5, 10, 20, 40):
        points["steps", length] = _loop(everything, 16, 32, length)
    for count in counts:
        points["sampling on devices, strong", count] = _loop(count, 16, 32, steps)
        points["sampling on devices, weak", count] = _loop(count, 8 * count, 32, steps)
        points["training on devices, strong", count] = _training(count, 16, 32)
        points["training on devices, weak", count] = _training(count, 8 * count, 32)
    log(f"scaling: {len(points)} points …")
    times = interleave({str(point): work for point, work in points.items()}, settings.rounds)
    return [
        {"curve": curve, "size": size, "seconds": times[str((curve, size))]}
        for curve, size in points
    ]


def _over(count: int, batch: int) -> NamedSharding:
    return data_sharding(device_mesh(batch, devices=jax.devices()[:count]))


def _loop(devices: int, batch: int, size: int, steps: int) -> Callable[[], Any]:
    shape = (batch, size, size, 3)
    return sides.jax_loop(TUTORIAL, sides.chain(steps), shape, _over(devices, batch))


def _training(devices: int, batch: int, size: int) -> Callable[[], Any]:
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    network = TUTORIAL._replace(image_shape=(size, size, 3))
    work = sides.jax_training(network, schedule, batch, 1e-3)
    return partial(sides.JaxTrainer(*work, _over(devices, batch)).run, 1)
