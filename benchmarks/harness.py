"""What every benchmark shares: sizes, timing in turns, comparison before timing, and the machine.

JAX and torch are imported where they are used, since a section chooses its devices first.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

__all__ = [
    "FULL",
    "PRECISION",
    "SHORT",
    "Disagreement",
    "Log",
    "Race",
    "Row",
    "Settings",
    "attempt",
    "available",
    "check_agreement",
    "cores",
    "describe",
    "interleave",
    "left_out",
    "max_relative_difference",
    "measure",
    "on_gpu",
    "problem",
    "resident_bytes",
    "summary",
    "timed",
]

Row = dict[str, Any]
Log = Callable[[str], None]
Result = TypeVar("Result")

PRECISION = "float32, matrix products and convolutions at 'highest' (no TF32) on both sides"
_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes and repeats of one run.

    Attributes:
      sampling_batches, training_batches: batch sizes to time.
      sampling_steps: images times steps of a reverse chain. Every step costs the same, so a short
        chain gives the cost of each, if it takes 0.3 s or more: the first touch of memory, which a
        run pays once, has to be small beside it.
      training_steps: likewise, of optimizer steps in one timed run; never fewer than are compared.
      rounds: timed runs of every contender, taken in turns.
      overhead_steps: length of the chain whose network does nothing.
      chain_lengths: T of the programs whose size is compared.
      cifar10_sampling_batches, cifar10_training_batches: batch sizes of the large network.
      cifar10_steps: images times steps of its chain.
      cifar10_rounds: its timed runs, each of seconds.
      scaling_steps: length of the chain in the scaling curves.
      processes: how many new processes measure memory and the start.
    """

    sampling_batches: tuple[int, ...] = (1, 4, 16)
    training_batches: tuple[int, ...] = (4, 16)
    sampling_steps: int = 120
    training_steps: int = 96
    rounds: int = 5
    overhead_steps: int = 1000
    chain_lengths: tuple[int, ...] = (10, 100, 1000)
    cifar10_sampling_batches: tuple[int, ...] = (1, 4)
    cifar10_training_batches: tuple[int, ...] = (4,)
    cifar10_steps: int = 20
    cifar10_rounds: int = 3
    scaling_steps: int = 5
    processes: int = 1


SHORT = Settings()
FULL = Settings(
    sampling_batches=(1, 4, 16, 64),
    training_batches=(4, 16, 64),
    cifar10_sampling_batches=(1, 4, 16),
    cifar10_training_batches=(4, 8),
    cifar10_rounds=4,
    processes=3,
)


def measure(module: str, section: str, settings: Settings) -> tuple[Row, list[Row]]:
    """What one section ran on, and its rows. Call in a new process."""
    from jax_ddpm.cpu import use_cores

    use_cores()
    import jax
    import torch

    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(cores())
    run = getattr(import_module(f"benchmarks.{module}"), section)
    return describe(), run(settings, lambda line: print(line, file=sys.stderr, flush=True))


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """`function()` and the seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, in the order A, B, C, A, B, C, …

    The contenders take turns, so that a slow minute of the machine slows them all. A run returns
    only when its work is done. One untimed round comes first.
    """
    times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            _, seconds = timed(run)
            if number > 0:
                times[name].append(seconds)
    return times


def summary(times: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(times), min(times), max(times)


class Disagreement(Exception):
    """Two contenders computed different things, so their times cannot be compared."""


def max_relative_difference(value: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value; infinite where anything is not finite.

    Raises `ValueError` if the shapes differ.
    """
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape:
        raise ValueError(f"value: expected shape {reference.shape}, got {value.shape}")
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return float("inf")
    return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))


def check_agreement(
    outputs: Mapping[str, np.ndarray], reference: str, tolerance: float
) -> dict[str, float]:
    """Each contender's `max_relative_difference` from the one named `reference`.

    Raises `Disagreement`, naming the contenders, if any is above `tolerance`.
    """
    differences = {
        name: max_relative_difference(output, outputs[reference])
        for name, output in outputs.items()
        if name != reference
    }
    wrong = [f"{name} by {diff:.1e}" for name, diff in differences.items() if not diff <= tolerance]
    if wrong:
        raise Disagreement(
            f"expected outputs within {tolerance:.0e} of {reference}'s, got {', '.join(wrong)}"
        )
    return differences


class Race:
    """Contenders of one piece of work: first compared with `reference`, then timed in turns."""

    def __init__(self, title: str, reference: str, tolerance: float, log: Log) -> None:
        self._title, self._log = title, log
        self._reference, self._tolerance = reference, tolerance
        self._runs: dict[str, Callable[[], object]] = {}
        self._outputs: dict[str, np.ndarray] = {}
        self._facts: dict[str, Row] = {}

    def enter(
        self,
        name: str,
        run: Callable[[], object],
        output: np.ndarray,
        first: float,
        sharding: Any = None,
    ) -> None:
        """`output` is what is compared, `first` the seconds of what includes compilation."""
        compiles = name.startswith(("JAX", "torch.compile"))
        self._runs[name], self._outputs[name] = run, output
        self._facts[name] = {
            "devices": 1 if sharding is None else sharding.mesh.size,
            "compile_s": first if compiles else None,
        }

    def run(self, batch: int, steps: int, rounds: int) -> list[Row]:
        """A row for each contender, whose runs take `steps` steps; may raise `Disagreement`."""
        differences = check_agreement(self._outputs, self._reference, self._tolerance)
        self._log(f"{self._title}: the same to {max(differences.values()):.1e}; timing …")
        times = interleave(self._runs, rounds)
        return [
            {
                "contender": name,
                "batch": batch,
                "steps": steps,
                "max_relative_difference": differences.get(name),
                **self._facts[name],
                "seconds_per_step": [seconds / steps for seconds in times[name]],
            }
            for name in self._runs
        ]


def cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def resident_bytes(field: str) -> int:
    """Memory of this process: `"VmRSS"` now, `"RssAnon"` without files, `"VmHWM"` at the highest.
    Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


def on_gpu() -> bool:
    """Whether JAX computes on a GPU here."""
    import jax

    return jax.default_backend() == "gpu"


def describe() -> Row:
    """Machine, versions, precision and date, for the record."""
    import jax
    import torch

    device, cpu = jax.devices()[0], _cpu_model()
    torch_gpu = on_gpu() and torch.cuda.is_available()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": cores(),
        "jax_device": cpu if device.platform == "cpu" else device.device_kind,
        "torch_device": torch.cuda.get_device_name() if torch_gpu else cpu,
        "torch_threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "precision": PRECISION,
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("jax", "jaxlib", "flax", "torch", "diffusers")},
        },
    }


def _cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def attempt(labels: Row, work: Callable[[], list[Row]]) -> list[Row]:
    """The rows that `work` returns; where it raises, one that says so."""
    try:
        return work()
    except Exception as error:
        return [problem(labels, error)]


def problem(labels: Row, error: Exception) -> Row:
    """A row for what raised `error`: failed, or out of memory."""
    text = str(error).strip()
    memory = isinstance(error, MemoryError) or any(each in text for each in _OUT_OF_MEMORY)
    line = text.partition("\n")[0][:300]
    return {
        **labels,
        "status": "out of memory" if memory else "failed",
        "problem": f"{type(error).__name__}: {line}",
    }


def left_out(labels: Row, reason: str) -> Row:
    """A row for what was not done."""
    return {**labels, "status": "left out", "problem": reason}


def available(package: str) -> bool:
    """Whether `package` can be imported here."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False
