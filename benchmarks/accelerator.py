"""Correctness and speed on one GPU or TPU, in six minutes: `python -m benchmarks accelerator`.

On JAX's default backend: training that is resumed, against training that is not; parity with torch
on the CPU; the reverse loop and the training step against torch on the same device. Writes JSON and
markdown named after the device; exit code 1 if anything failed.

Six minutes hold the most telling races. Parts that are named have the time to themselves, and the
record keeps what the same device and versions gave for the others.

It needs jax, flax, optax, numpy, jaxtyping and torch. What needs more is left out by name.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax

from benchmarks import accelerator_parity, accelerator_speed, processes
from benchmarks.harness import Row, attempt, describe, left_out, summary
from benchmarks.networks import specs
from jax_ddpm.io.files import replace_file

__all__ = ["Clock", "main", "markdown", "slug"]

PARTS = ("resume", "parity", "attention", "tutorial", "ddpm_cifar10")
PRECISION = (
    "float32 is 'highest' on both sides, bfloat16 is the network's dtype in JAX and autocast in "
    "torch; weights are float32."
)
_BUDGET = 330.0
_BATCHES = (128, 16, 512)
_NO_TIME, _NOT_ASKED = "no time left", "not asked for"
_KINDS = {
    "maths": "schedule, q, p, losses",
    "forward": "SimpleUNet: output",
    "gradients": "SimpleUNet: gradient of every parameter",
    "training": "SimpleUNet: Adam steps, weights and losses",
    "chain": "SimpleUNet: reverse chain, every state",
    "attention": "attention: output and gradients",
    "unet": "UNet: output",
}

Work = Callable[[], list[Row]]


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

    def time(self, kind: Any, work: Work) -> list[Row]:
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
    _recorded.cache_clear()
    # Before JAX's backend starts: memory is left for torch, of a GPU at least half.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    parts = arguments.parts or PARTS
    rows: list[Row] = []
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


def _attempt(clock: Clock, labels: Row, kind: Any, work: Work) -> list[Row]:
    if kind is None:  # nothing that takes time
        return work()
    if not clock.allows(kind):
        return [left_out(labels, _NO_TIME)]
    said = ", ".join(str(value) for name, value in labels.items() if name != "part")
    print(f"{clock.seconds:4.0f} s: {said} …", file=sys.stderr, flush=True)
    return clock.time(kind, lambda: attempt(labels, work))


def _measure(parts: Iterable[str], cache: str, *, tiny: bool) -> Iterator[tuple[Row, Any, Work]]:
    """Labels, a kind for the clock (None for what takes no time), and the work.

    The most important comes first, but resuming before all, while the device is free.
    """
    if "resume" in parts:
        labels = {"part": "resume", "name": "training, saved and resumed"}
        yield labels, "resume", lambda: processes.check_resuming(tiny=tiny)

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
            labels = race.labels(spec.network.name)
            if tiny and race.compiled:
                row = left_out(labels, "--tiny has no torch.compile")
                yield labels, None, lambda row=row: [row]
                continue
            work = partial(accelerator_speed.run, race, spec, **options)
            yield labels, (race.part, race.work, race.compiled), work


@cache
def _recorded(path: Path) -> dict[str, Any] | None:
    """The record of an earlier call, as it was before this one wrote any."""
    return json.loads(path.read_text()) if path.exists() else None


def _write(arguments: argparse.Namespace, parts: Iterable[str], rows: list[Row]) -> Path:
    """JSON and markdown, named after the device; the path of the latter.

    What an earlier call measured stays until it is measured again.
    """
    kind = jax.devices()[0].device_kind
    path = arguments.out / f"accelerator-{slug(kind)}.json"
    record = {
        "device_kind": kind,
        "backend": jax.default_backend(),
        "machine": describe() | {"precision": PRECISION},
        "precision": PRECISION,
        "tiny": arguments.tiny,
    }
    old = _recorded(path)
    if old is not None and _alike(old, record):
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


def markdown(record: dict[str, Any]) -> str:
    """The whole report: device, parity, resuming, times, what is left out."""
    machine, rows = record["machine"], record["rows"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"Measured {machine['date'][:10]} on {record['device_kind']} ({record['backend']}); "
        f"{versions}. "
        f"{record['precision']}",
    ]
    lines += _parity([row for row in rows if "error" in row])
    for row in rows:
        if row["part"] == "resume" and "arrays" in row:
            lines += ["", "**Resuming**", "", _resume(row)]
    lines += _speed([row for row in rows if row["status"] == "timed"])
    for title, status in (
        ("Failed", "failed"),
        ("Out of memory", "out of memory"),
        ("Left out", "left out"),
    ):
        groups: dict[str, list[str]] = {}
        for row in rows:
            if row["status"] == status:
                group, what = _what(row)
                groups.setdefault(f"{row['problem']}{group}", []).append(what)
        if groups:
            lines += ["", f"**{title}**", ""]
            lines += [f"- {group}: {'; '.join(names)}" for group, names in groups.items()]
    return "\n".join(lines) + "\n"


def _parity(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", "**Parity**: worst error over the largest reference value", ""]
    lines += ["| against torch on the CPU | arithmetic | cases | error | allowed | |"]
    lines += ["|---|---|---|---|---|---|"]
    for kind, mode in dict.fromkeys((row["kind"], row["mode"]) for row in rows):
        here = [row for row in rows if (row["kind"], row["mode"]) == (kind, mode)]
        errors = [float("inf") if row["error"] is None else row["error"] for row in here]
        verdict = "passed" if all(row["status"] == "passed" for row in here) else "**failed**"
        lines.append(
            f"| {_KINDS.get(kind, kind)} | {mode} | {len(here)} | {max(errors):.1e} "
            f"| {here[0]['tolerance']:.0e} | {verdict} |"
        )
    return lines


def _resume(row: Row) -> str:
    equal = row["arrays"] - len(row["differing"])
    flags = f", `{row['xla_flags']}`" if row["xla_flags"] else ""
    return (
        f"{row['name']}, in a new process: {equal} of {row['arrays']} arrays equal to the bit "
        f"(saved with {row['saved_with']}{flags})."
    )


def _speed(rows: list[Row]) -> list[str]:
    if not rows:
        return []
    lines = ["", "**Speed**: milliseconds per step, median (low – high)", ""]
    lines += ["| network | work | batch | arithmetic | contender | ms | × JAX | plan's estimate |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    key = ("network", "work", "batch", "arithmetic", "against")
    for row in rows:
        race = (each for each in rows if all(each[name] == row[name] for name in key))
        middle, low, high = (1e3 * value for value in summary(row["seconds_per_step"]))
        lines.append(
            f"| {row['network']} | {row['work']} | {row['batch']} | {row['arithmetic']} "
            f"| {row['contender']} | {_number(middle)} ({_number(low)} – {_number(high)}) "
            f"| {_ratio(row, race)} | {_estimate(row.get('estimate'))} |"
        )
    reasons = (row["estimate"].get("why") for row in rows if "estimate" in row)
    lines += [f"\nNo estimate: {why}." for why in dict.fromkeys(filter(None, reasons))]
    if not any(row.get("difference") is not None for row in rows):
        lines += ["\nNothing was compared before it was timed: there was one contender."]
    return lines


def _ratio(row: Row, race: Iterable[Row]) -> str:
    """How many times as long as JAX, in the same race."""
    ours = [each["seconds_per_step"] for each in race if each["contender"] == "JAX"]
    if row["contender"] == "JAX" or not ours:
        return ""
    return f"{statistics.median(row['seconds_per_step']) / statistics.median(ours[0]):.2f}"


def _estimate(figures: dict[str, Any] | None) -> str:
    if figures is None or figures["seconds"] is None:
        return ""
    return f"{_number(1e3 * figures['seconds'])} ({figures['bound']}, {figures['products']})"


def _what(row: Row) -> tuple[str, str]:
    """The race that a row belongs to, if any, and the row's name."""
    names = ("name", "work", "batch", "arithmetic", "mode")
    what = ", ".join(str(row[name]) for name in names if name in row)
    if "network" not in row:
        return "", what
    return f", {row['network']}, {row.get('contender', row['against'])}", what


def _number(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:,.0f}"
