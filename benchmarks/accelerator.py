"""`python -m benchmarks accelerator`: is it right here, and how fast, in six minutes.

On JAX's default backend, meant to be one GPU or TPU: training that is resumed, against training
that is not; parity with torch on the CPU; the reverse loop and the training step against torch on
the same device. Writes JSON and markdown named after the device; exit code 1 if anything failed.

Six minutes hold the most telling races. Parts that are named have the time to themselves, and the
record keeps what the same device and versions gave for the others.

It needs jax, flax, optax, numpy, jaxtyping and torch. What needs more is left out by name.
"""

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

__all__ = ["Clock", "main", "slug"]

PARTS = ("resume", "parity", "attention", "tutorial", "ddpm_cifar10")
PRECISION = (
    "float32 is 'highest' on both sides, bfloat16 is the network's dtype in JAX and autocast in "
    "torch; weights are float32."
)
_BUDGET = 330.0
_BATCHES = (128, 16, 512)
_NO_TIME, _NOT_ASKED = "no time left", "not asked for"

Work = Callable[[], list[dict[str, Any]]]


class Clock:
    """The seconds that are left, and whether they are enough for work of a kind."""

    def __init__(self, budget: float, now: Callable[[], float] = time.perf_counter) -> None:
        self._now, self._start, self._budget = now, now(), budget
        self._longest: dict[Any, float] = {}

    @property
    def seconds(self) -> float:
        """Since the start."""
        return self._now() - self._start

    def allows(self, kind: Any) -> bool:
        """Whether work as long as the longest of its kind would end in time. A new kind is taken
        to be as long as the longest of all."""
        guess = self._longest.get(kind, max(self._longest.values(), default=0))
        return self.seconds + guess < self._budget

    def time(self, kind: Any, work: Work) -> list[dict[str, Any]]:
        """What `work` returns."""
        start = self._now()
        rows = work()
        self._longest[kind] = max(self._now() - start, self._longest.get(kind, 0))
        return rows


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks accelerator",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}: these alone"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=_BUDGET,
        metavar="SECONDS",
        help="what does not fit is left out by name (default: %(default)g)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="where the record is written (default: benchmarks/results)",
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes and networks: a trial of the command"
    )
    arguments = parser.parse_args(argv)
    for part in arguments.parts:
        if part not in PARTS:
            parser.error(f"expected parts of {', '.join(PARTS)}, got {part}")
    clock = Clock(arguments.budget)
    # Before JAX's backend starts: memory is left for torch, of a GPU at least half.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    parts = arguments.parts or PARTS
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as cache:
        for labels, kind, work in _measure(parts, cache, tiny=arguments.tiny):
            piece = ", ".join(map(str, labels.values()))
            rows += [{**row, "piece": piece} for row in _attempt(clock, labels, kind, work)]
            # Each time, so that what is stopped has lost nothing.
            _write(arguments, parts, rows)
    path = _write(arguments, parts, rows)
    print(path.read_text())
    print(f"wrote {path.stem}.json and .md to {arguments.out}")
    sys.exit(1 if any(row["status"] == "failed" for row in rows) else 0)


def _attempt(clock: Clock, labels: dict[str, Any], kind: Any, work: Work) -> list[dict[str, Any]]:
    from benchmarks.accelerator_rows import attempt, left_out

    if kind is None:  # nothing that takes time
        return work()
    if not clock.allows(kind):
        return [left_out(labels, _NO_TIME)]
    said = ", ".join(str(value) for name, value in labels.items() if name != "part")
    print(f"{clock.seconds:4.0f} s: {said} …", file=sys.stderr, flush=True)
    return clock.time(kind, lambda: attempt(labels, work))


def _measure(
    parts: Iterable[str], cache: str, *, tiny: bool
) -> Iterator[tuple[dict[str, Any], Any, Work]]:
    """What there is to do, most important first: but resuming before all, while the device is
    free. Labels, a kind for the clock (None for what takes no time), and the work."""
    from benchmarks import accelerator_resume

    if "resume" in parts:
        labels = {"part": "resume", "name": "training, saved and resumed"}
        yield labels, "resume", lambda: accelerator_resume.check(tiny=tiny)

    import jax

    from benchmarks import accelerator_parity, accelerator_speed
    from benchmarks.accelerator_networks import specs
    from benchmarks.accelerator_rows import left_out

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        # What raced against eager torch is compiled once more to race against torch.compile.
        jax.config.update("jax_compilation_cache_dir", cache)
    comparisons = []
    if "parity" in parts:
        comparisons, missing = accelerator_parity.items(tiny=tiny)
        yield {}, None, lambda: missing
    if "attention" in parts:
        comparisons += accelerator_parity.attention(tiny=tiny)
    for labels, work in comparisons:
        yield labels, ("parity", labels["name"]), work
    networks = specs(tiny=tiny)
    options = {"rounds": 2, "least": 0.0} if tiny else {"rounds": 3, "least": 0.3}
    batches = (2,) if tiny else _BATCHES
    for race in accelerator_speed.schedule_of_races(jax.default_backend(), batches):
        if race.part in parts:
            spec = networks[race.part]
            labels = race.labels(spec.name)
            if tiny and race.compiled:
                row = left_out(labels, "--tiny has no torch.compile")
                yield labels, None, lambda row=row: [row]
                continue
            work = partial(accelerator_speed.run, race, spec, **options)
            yield labels, (race.part, race.work, race.compiled), work


def _write(arguments: argparse.Namespace, parts: Iterable[str], rows: list[dict[str, Any]]) -> Path:
    """JSON and markdown, named after the device; the path of the latter.

    What an earlier call measured stays until it is measured again.
    """
    import jax

    from benchmarks.accelerator_report import markdown
    from benchmarks.accelerator_rows import left_out
    from benchmarks.machine import describe
    from jax_ddpm.io.files import replace_file

    kind = jax.devices()[0].device_kind
    path = arguments.out / f"accelerator-{slug(kind)}.json"
    record = {
        "device_kind": kind,
        "backend": jax.default_backend(),
        "machine": describe() | {"precision": PRECISION},
        "precision": PRECISION,
        "tiny": arguments.tiny,
    }
    if path.exists() and _alike(old := json.loads(path.read_text()), record):
        kept = [row for row in old["rows"] if row.get("problem") != _NOT_ASKED]
        measured = {row["piece"] for row in kept if row["status"] != "left out"}
        rows = [row for row in rows if row["status"] != "left out" or row["piece"] not in measured]
        again = {row["piece"] for row in rows}
        rows = [row for row in kept if row["piece"] not in again] + rows
    absent = set(PARTS) - set(parts) - {row["part"] for row in rows}
    rows = rows + [left_out({"part": part, "name": part}, _NOT_ASKED) for part in absent]
    record["rows"] = sorted(rows, key=lambda row: PARTS.index(row["part"]))
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(record, indent=1) + "\n").encode())
    replace_file(path.with_suffix(".md"), markdown(record).encode())
    return path.with_suffix(".md")


def _alike(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether both are records of the same machine, the same versions and the same sizes."""
    facts = [
        {**record, "rows": None, "machine": {**record["machine"], "date": None}}
        for record in (one, other)
    ]
    return facts[0] == facts[1]


def slug(device_kind: str) -> str:
    """`NVIDIA H100 80GB HBM3` as `nvidia-h100-80gb-hbm3`."""
    return re.sub(r"[^a-z0-9]+", "-", device_kind.lower()).strip("-")


if __name__ == "__main__":
    main()
