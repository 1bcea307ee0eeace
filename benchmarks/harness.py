"""What every benchmark shares: comparison before timing, timing in turns, processes, the machine.

JAX and torch are imported where they are used, since a section chooses its devices first.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

Row = dict[str, Any]
Result = TypeVar("Result")

REFERENCE = "torch eager"
PRECISION = "float32, matrix products and convolutions at 'highest' (no TF32) on both sides"


class Contender(NamedTuple):
    """One side of a race."""

    run: Callable[[], object]
    """The work that is timed; it returns when the work is done."""
    output: Callable[[], np.ndarray]
    """The same work on given noise, for the comparison."""
    compile_s: float | None = None
    """Known before the first run: JAX's."""
    program: Any = None
    """JAX's, compiled."""
    flops: float = 0.0


def measure(section: str, full: bool) -> tuple[Row, list[Row]]:
    """The machine, and the rows of one section. Call in a new process.

    A section is the function of its name, in a module of its name or in `sections`.
    """
    from jax_ddpm.cpu import use_cores

    use_cores()
    import jax
    import torch

    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(cores())
    own = find_spec(f"benchmarks.{section}")
    module = import_module(f"benchmarks.{section}" if own else "benchmarks.sections")
    return describe(), getattr(module, section)(full)


def race(
    contenders: Mapping[str, Contender], batch: int, steps: int, tolerance: float, rounds: int
) -> list[Row]:
    """Compare all outputs with `REFERENCE`'s, then time the runs, of `steps` steps each.

    Returns a row for each contender. Raises `ValueError`, before anything is timed, if a difference
    is above `tolerance` times the largest reference value, or not finite.
    """
    outputs = {name: timed(each.output) for name, each in contenders.items()}
    reference = REFERENCE if REFERENCE in outputs else next(iter(outputs))
    right = np.asarray(outputs[reference][0], np.float64)
    differences = {
        name: float(np.max(np.abs(output - right)) / np.max(np.abs(right)))
        for name, (output, _) in outputs.items()
    }
    if wrong := [f"{name} by {x:.1e}" for name, x in differences.items() if not x <= tolerance]:
        expected = f"expected outputs within {tolerance:.0e} of {reference}'s"
        raise ValueError(f"{expected}, got {', '.join(wrong)}")
    times = interleave({name: each.run for name, each in contenders.items()}, rounds)
    return [
        {
            "contender": name,
            "batch": batch,
            "steps": steps,
            "max_relative_difference": differences[name],
            "compile_s": outputs[name][1] if name.startswith("torch.compile") else each.compile_s,
            "seconds_per_step": [seconds / steps for seconds in times[name]],
        }
        for name, each in contenders.items()
    ]


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, in the order A, B, C, A, B, C, …

    The contenders take turns, so that a slow minute of the machine slows them all. One untimed
    round comes first.
    """
    times = [{name: timed(run)[1] for name, run in runs.items()} for _ in range(rounds + 1)]
    return {name: [each[name] for each in times[1:]] for name in runs}


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """`function()` and the seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def in_new_process(function: Callable[..., Result], *arguments: Any) -> Result:
    """`function(*arguments)`, in a process that inherits neither memory nor threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def options(doc: str | None) -> argparse.ArgumentParser:
    """A script's command line: its docstring is the help, `--out` the folder of its record."""
    raw, results = argparse.RawDescriptionHelpFormatter, Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=doc, formatter_class=raw)
    folder = "of the record (default: benchmarks/results)"
    parser.add_argument("--out", type=Path, default=results, metavar="FOLDER", help=folder)
    return parser


def write(path: Path, record: Any, text: str) -> None:
    """A record, as JSON and as markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    path.with_suffix(".md").write_text(text)


def number(value: float) -> str:
    """Three digits, or the whole number."""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 100 else f"{value:.3g}"


def spread(values: Sequence[float]) -> str:
    """Median, lowest and highest: `1.01 (0.9 – 1.2)`."""
    return f"{number(statistics.median(values))} ({number(min(values))} – {number(max(values))})"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """The lines of a table in markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(str, line)) + " |" for line in lines]


def say(line: str) -> None:
    """Progress, apart from the results."""
    print(line, file=sys.stderr, flush=True)


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes(field: str) -> int:
    """Memory of this process: `"VmRSS"` now, `"RssAnon"` without files, `"VmHWM"` at the highest.
    Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def describe() -> Row:
    """Machine, versions, precision and date, for the record."""
    import jax
    import torch

    device, cpu = jax.devices()[0], _cpu()
    torch_gpu = device.platform == "gpu" and torch.cuda.is_available()
    packages = ("jax", "jaxlib", "flax", "torch", "diffusers")
    versions = {name: version(name) for name in packages if find_spec(name)}
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": cpu,
        "cores": cores(),
        "jax_device": cpu if device.platform == "cpu" else device.device_kind,
        "torch_device": torch.cuda.get_device_name() if torch_gpu else cpu,
        "torch_threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
        "precision": PRECISION,
        "versions": {"python": platform.python_version()} | versions,
    }


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()
