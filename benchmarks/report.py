"""What was measured, as ratios, as markdown tables and as a picture.

A ratio is PyTorch's time, or memory, divided by ours. It is taken round by round, since the
contenders of a round ran within the same moments. Its median, and its lowest and highest round, are
what a later run is compared with.
"""

import itertools
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, number, spread, table

_BETWEEN_RUNS = 1.03
"""How far a median may leave the other run's rounds: those of one process share where its memory
lies. Between two runs of the same code the largest distances seen were 0.6 % of a time and 2.5 %
of a peak of memory."""

Ratios = dict[tuple[str, int], tuple[str, list[float]]]
"""By work and batch: the best of theirs, and the ratio of each round; above 1, ours is better."""


def ratios(results: Mapping[str, Any]) -> Ratios:
    """Every ratio that `results` holds: the best of theirs to the best of ours, at equal labels."""
    groups: dict[tuple[str, int], dict[str, list[float]]] = {}
    for section, rows in results.items():
        for row in rows if isinstance(rows, list) else ():
            times = row.get("seconds_per_step") or row.get("seconds") or row.get("bytes")
            if rates := row.get("gflop_per_second"):
                times = [1 / rate for rate in rates]
            if isinstance(times, list) and "contender" in row:
                labels = [row[name] for name in ("what", "work", "arithmetic") if name in row]
                work = ", ".join([section, *labels]), row.get("batch", 1)
                groups.setdefault(work, {})[row["contender"]] = times
    found: Ratios = {}
    for work, values in groups.items():
        names = sorted(values, key=lambda name, values=values: statistics.median(values[name]))
        ours = [name for name in names if name.startswith("JAX")]
        theirs = [name for name in names if name not in ours]
        if ours and theirs:
            # Processes do not take turns: every pair of them is a round.
            pairs = itertools.product if work[0].startswith("processes") else zip
            rounds = [other / own for other, own in pairs(values[theirs[0]], values[ours[0]])]
            found[work] = theirs[0], rounds
    return found


def moved(recorded: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """A line for each ratio whose median left the range of the other's rounds, both ways.

    Raises `ValueError` if the two have no ratio in common.
    """
    before, after = ratios(recorded), ratios(measured)
    if not before.keys() & after.keys():
        raise ValueError("recorded: expected ratios of the same work, got none")
    pairs = {work: (before[work][1], after[work][1]) for work in before if work in after}
    return [
        f"{work}, batch {batch}: {spread(then)} then, {spread(now)} now"
        for (work, batch), (then, now) in pairs.items()
        if not _near(now, then) and not _near(then, now)
    ]


def _near(rounds: list[float], others: list[float]) -> bool:
    """Whether the median is within the others."""
    low, high = min(others) / _BETWEEN_RUNS, max(others) * _BETWEEN_RUNS
    return low <= statistics.median(rounds) <= high


def markdown(results: Mapping[str, Any]) -> str:
    """The whole report: machine, ratios, and the rows of each section."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"Measured {machine['date'][:10]} on {machine['jax_device']}, {machine['cores']} cores; "
        f"{versions}; {machine['precision']}. Median (lowest – highest).",
    ]
    if found := ratios(results):
        cells = [[*work, spread(rounds), theirs] for work, (theirs, rounds) in found.items()]
        lines += ["", "**ratios**: the best other way's time, or memory, divided by ours", ""]
        lines += table(["work", "batch", "ratio", "against"], cells)
    for section, rows in results.items():
        if isinstance(rows, list) and rows:
            names = list(dict.fromkeys(name for row in rows for name in row))
            header = [_UNITS.get(name, (name,))[0].replace("_", " ") for name in names]
            cells = [[_cell(name, row.get(name)) for name in names] for row in rows]
            lines += ["", f"**{section}**", "", *table(header, cells)]
    return "\n".join(lines) + "\n"


_UNITS = {
    "seconds_per_step": ("ms per step", 1e3),
    "seconds": ("ms", 1e3),
    "plan_seconds": ("ms by plan", 1e3),
    "bytes": ("MiB", 2**-20),
    "temporary_bytes": ("temporary MiB", 2**-20),
}
"""Columns that are shown in other units than they are recorded in."""


def _cell(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    _, factor = _UNITS.get(name, (name, 1))
    if isinstance(value, list):
        return spread([factor * each for each in value])
    return number(factor * value)


def plot_scaling(rows: list[Row], path: Path) -> None:
    """Every curve, with what a perfect machine would do from its first point on."""
    # Imported here, since an accelerator's report needs none of it.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(13, 6), layout="tight")
    axes = figure.subplots(2, 4)
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    for axis, curve in zip(axes.flat, curves, strict=False):
        here = [row for row in rows if row["curve"] == curve]
        sizes = [row["size"] for row in here]
        times = [[1e3 * seconds for seconds in row["seconds"]] for row in here]
        middle = [statistics.median(each) for each in times]
        power = {"image size": 2, "strong": -1, "weak": 0}.get(curve.rpartition(", ")[2], 1)
        perfect = [middle[0] * (size / sizes[0]) ** power for size in sizes]
        axis.plot(sizes, perfect, "--", color="#999999", label="perfect")
        low, high = [min(each) for each in times], [max(each) for each in times]
        axis.fill_between(sizes, low, high, color="#9ecae1", alpha=0.6)
        axis.plot(sizes, middle, "o-", color="#2171b5", label="median, and range")
        axis.set_title(curve, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 4, 5, 6, 8)))
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    figure.supylabel("milliseconds", fontsize=10)
    figure.savefig(path, dpi=110)
