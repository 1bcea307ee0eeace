"""`ddpm_cifar10`, 35.7 M parameters: the training step (Adam) against the same in torch."""

from collections.abc import Callable
from typing import Any

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.settings import Settings
from benchmarks.training import run_batch

__all__ = ["run"]


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if losses differ."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    return [
        row
        for batch in settings.cifar10_training_batches
        for row in run_batch(sides.CIFAR10, schedule, batch, 1, settings.cifar10_rounds, log)
    ]
