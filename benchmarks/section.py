"""One section of the benchmarks, set up in a process of its own."""

import sys
from importlib import import_module
from typing import Any

from benchmarks.settings import Settings

__all__ = ["measure"]


def measure(name: str, settings: Settings) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """One section, in a process of its own: what it ran on, and its rows."""
    from jax_ddpm.cpu import use_cores

    use_cores()
    import jax
    import torch

    from benchmarks import machine

    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(machine.cores())
    return machine.describe(), import_module(f"benchmarks.{name}").run(settings, _log)


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
