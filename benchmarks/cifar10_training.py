"""`ddpm_cifar10`, 35.7 M parameters: the training step (Adam) against the same in torch."""

from collections.abc import Callable
from typing import Any

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.settings import Settings
from benchmarks.training import run_batch

__all__ = ["run"]

_LEARNING_RATE = 1e-5
"""Adam divides rounding by itself, and every step magnifies it: at 1e-3 the losses of eager and
compiled torch are 1.1e-2 apart after two steps, at this rate 3e-4, where a step changes them by
8e-3."""


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if losses differ."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    return [
        row
        for batch in settings.cifar10_training_batches
        for row in run_batch(
            sides.CIFAR10, schedule, batch, _LEARNING_RATE, 4, settings.cifar10_rounds, log
        )
    ]
