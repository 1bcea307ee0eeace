"""What was measured, as ratios, as markdown tables and as pictures.

A ratio is how many times as long the other side takes. It is taken round by round, since the
contenders of a round ran within the same moments. Its median, and its lowest and highest round, are
what a later run is compared with.
"""

import statistics
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

from benchmarks.harness import summary

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

__all__ = ["Ratio", "markdown", "moved", "plot", "plot_scaling", "ratios"]

_EAGER, _COMPILED = "torch eager", "torch.compile, channels_last"
_COLOURS = {
    "JAX jit": "#9ecae1",
    "JAX jit, sharded over cores": "#2171b5",
    "torch eager": "#fdd0a2",
    "torch eager, channels_last": "#fdae6b",
    "torch.compile": "#f16913",
    "torch.compile, channels_last": "#a63603",
}

_TIMED = {
    "sampling": "tutorial reverse loop, 64×64",
    "training": "tutorial training step",
    "cifar10_sampling": "`ddpm_cifar10` reverse loop",
    "cifar10_training": "`ddpm_cifar10` training step",
}

_BETWEEN_RUNS = 1.03
"""How far a median may leave the other run's rounds: those of one process share where its memory
lies. Between two runs of the same code the largest distances seen were 0.6 % of a time and 2.5 %
of a peak of memory."""


class Ratio(NamedTuple):
    """Above 1, ours is the better."""

    work: str
    batch: int
    ours: str
    theirs: str
    rounds: list[float]

    @property
    def middle(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)


def ratios(results: dict[str, Any]) -> list[Ratio]:
    """Every ratio that `results` holds: the fastest of ours to the fastest of theirs."""
    found = []
    for section, work in _TIMED.items():
        rows = results.get(section, [])
        for batch in sorted({row["batch"] for row in rows}):
            here = {r["contender"]: r["seconds_per_step"] for r in rows if r["batch"] == batch}
            ours, theirs = _fastest(here, ours=True), _fastest(here, ours=False)
            found.append(Ratio(work, batch, ours, theirs, _rounds(here[theirs], here[ours])))
    if overhead := results.get("overhead"):
        times = {row["contender"]: row["seconds_per_step"] for row in overhead}
        names = zip(("", ", DDIM"), list(times)[:2], list(times)[2:], strict=True)
        for kind, ours, theirs in names:
            rounds = _rounds(times[theirs], times[ours])
            found.append(Ratio(f"a step beyond the network{kind}", 1, ours, theirs, rounds))
    if peak := results.get("peak"):
        (_, best), (ours, share) = ((row["contender"], row["gflop_per_second"]) for row in peak)
        found.append(Ratio("share of the sgemm peak", 16, ours, "sgemm", _rounds(share, best)))
    if checkpoints := results.get("checkpoints"):
        without, with_ = (row["seconds"] for row in checkpoints)
        work = f"training with a checkpoint every {checkpoints[0]['steps']} steps"
        rounds = _rounds(without, with_)
        found.append(Ratio(work, checkpoints[0]["batch"], "with", "without", rounds))
    if processes := results.get("processes"):
        attention = {(r["side"], r["pass"]): r for r in processes if r["what"] == "attention"}
        for (side, part), row in attention.items():
            if side == "jax":
                work = f"memory of attention over 64×64 tokens, {part}"
                other = attention["torch", part]
                rounds = _pairs(other["bytes"], row["bytes"])
                found.append(Ratio(work, 1, row["contender"], other["contender"], rounds))
        memory = {row["contender"]: row["bytes"] for row in processes if row["what"] == "memory"}
        ours, theirs = _fastest(memory, ours=True), _fastest(memory, ours=False)
        rounds = _pairs(memory[theirs], memory[ours])
        found.append(Ratio("peak memory of sampling", 16, ours, theirs, rounds))
    return found


def moved(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """A line for each ratio whose median left the range of the other's rounds, both ways.

    Raises `ValueError` if the two have no ratio in common.
    """
    before = {(r.work, r.batch): r for r in ratios(recorded)}
    pairs = [(before[r.work, r.batch], r) for r in ratios(measured) if (r.work, r.batch) in before]
    if not pairs:
        raise ValueError("recorded: expected ratios of the same work, got none")
    return [
        f"{then.work}, batch {then.batch}: {then.middle:.2f} × ({_spread(then)}) then, "
        f"{now.middle:.2f} × ({_spread(now)}) now"
        for then, now in pairs
        if not _inside(now.middle, then.rounds) and not _inside(then.middle, now.rounds)
    ]


def _fastest(times: dict[str, list[float]], *, ours: bool) -> str:
    """The contender with the lowest median, of JAX's or of the others."""
    names = [name for name in times if name.startswith("JAX") == ours]
    return min(names, key=lambda name: statistics.median(times[name]))


def _rounds(theirs: list[float], ours: list[float]) -> list[float]:
    return [a / b for a, b in zip(theirs, ours, strict=True)]


def _pairs(theirs: list[float], ours: list[float]) -> list[float]:
    """Processes do not take turns: every pair of them is a round."""
    return [a / b for b in ours for a in theirs]


def _inside(value: float, rounds: list[float]) -> bool:
    return min(rounds) / _BETWEEN_RUNS <= value <= max(rounds) * _BETWEEN_RUNS


def _spread(ratio: Ratio) -> str:
    return f"{min(ratio.rounds):.2f} – {max(ratio.rounds):.2f}"


def markdown(results: dict[str, Any]) -> str:
    """The whole report: machine, times with their spread, ratios."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"Measured {machine['date'][:10]} on {machine['jax_device']}, {machine['cores']} cores; "
        f"{versions}; {machine['precision']}.",
    ]
    lines += ["", "**Ratios**: how many times as long, or as much, the best other way takes", ""]
    lines += _ratio_table(results)
    for title, name in (
        ("Reverse loop, milliseconds per step** (SimpleUNet, 64×64×3)", "sampling"),
        ("Training step, milliseconds** (SimpleUNet, 64×64×3)", "training"),
        ("Reverse loop, milliseconds per step** (`ddpm_cifar10`, 32×32×3)", "cifar10_sampling"),
        ("Training step, milliseconds** (`ddpm_cifar10`, 32×32×3)", "cifar10_training"),
    ):
        if name in results:
            lines += ["", f"**{title}", "", *_timed_table(results[name])]
    if "overhead" in results:
        lines += ["", "**A step beyond the network** (1 × 8×8×3)", ""]
        lines += ["| | microseconds: median (low – high) |", "|---|---|"]
        for row in results["overhead"]:
            middle, low, high = (1e6 * value for value in summary(row["seconds_per_step"]))
            lines.append(f"| {row['contender']} | {middle:.2f} ({low:.2f} – {high:.2f}) |")
    if "processes" in results:
        lines += _process_tables(results["processes"])
    if "growth" not in results:
        return "\n".join(lines) + "\n"
    lines += ["", "**The compiled loop against the length of the chain** (batch 4)", ""]
    lines += ["| T | lines of program | temporary memory | to compile |", "|---|---|---|---|"]
    for row in results["growth"]:
        lines.append(
            f"| {row['timesteps']:,} | {row['program_lines']:,} "
            f"| {row['temporary_bytes'] / 2**20:.1f} MiB | {row['compile_s']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


def _ratio_table(results: dict[str, Any]) -> list[str]:
    lines = ["| work | batch | ratio (low – high) | against |", "|---|---|---|---|"]
    for ratio in ratios(results):
        spread = f" ({_spread(ratio)})" if len(ratio.rounds) > 1 else ""
        lines.append(
            f"| {ratio.work} | {ratio.batch} | {ratio.middle:.2f} ×{spread} | {ratio.theirs} |"
        )
    return lines


def _process_tables(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["", "**Peak memory that sampling adds to a process** (batch 16, 64×64×3)", ""]
    lines += ["| | MiB |", "|---|---|"]
    for row in rows:
        if row["what"] == "memory":
            lines.append(f"| {row['contender']} | {statistics.median(row['bytes']) / 2**20:.0f} |")
    lines += [
        "",
        "**Peak memory that attention adds** (one image, 64×64 tokens, 8 heads of 64)",
        "",
    ]
    lines += ["| | forward, MiB | gradient, MiB |", "|---|---|---|"]
    attention = [row for row in rows if row["what"] == "attention"]
    for side in dict.fromkeys(row["side"] for row in attention):
        here = [row for row in attention if row["side"] == side]
        sizes = " | ".join(f"{statistics.median(row['bytes']) / 2**20:.0f}" for row in here)
        lines.append(f"| {here[0]['contender']} | {sizes} |")
    lines += ["", "**To the first 16 pictures, seconds** (`jax-ddpm sample`, digits, 50 steps)", ""]
    lines += ["| | imports | the rest |", "|---|---|---|"]
    for name in ("cold", "cache warm"):
        here = [r for r in rows if (r["what"], r["contender"]) == ("start", name)]
        imports, rest = (
            statistics.median(row[field] for row in here) for field in ("imports", "pictures")
        )
        lines.append(f"| {name} | {imports:.1f} | {rest:.1f} |")
    return lines


def _timed_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        f"| batch | | median (low – high) | to compile | {_EAGER} takes | {_COMPILED} takes |",
        "|---|---|---|---|---|---|",
    ]
    medians = {
        (row["batch"], row["contender"]): statistics.median(row["seconds_per_step"]) for row in rows
    }
    for row in rows:
        middle, low, high = (1e3 * value for value in summary(row["seconds_per_step"]))
        own = medians[row["batch"], row["contender"]]
        others = [medians.get((row["batch"], other)) for other in (_EAGER, _COMPILED)]
        takes = " | ".join(f"{other / own:.2f} ×" if other else "" for other in others)
        compiled = "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s"
        name = f"**{row['contender']}**" if row["contender"].startswith("JAX") else row["contender"]
        lines.append(
            f"| {row['batch']} | {name} | {middle:.1f} ({low:.1f} – {high:.1f}) | {compiled} "
            f"| {takes} |"
        )
    return lines


def plot(results: dict[str, Any], path: Path) -> None:
    """Time a step and image: sampling and training, the tutorial's network and the large one."""
    figure, axes = plt.subplots(2, 2, figsize=(10, 7.6))
    panels = {
        "sampling": "SimpleUNet, reverse loop",
        "training": "SimpleUNet, training step",
        "cifar10_sampling": "ddpm_cifar10, reverse loop",
        "cifar10_training": "ddpm_cifar10, training step",
    }
    for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
        rows = results.get(name)
        if rows is None:
            axis.axis("off")
            continue
        batches = sorted({row["batch"] for row in rows})
        present = [c for c in _COLOURS if any(row["contender"] == c for row in rows)]
        width = 0.85 / len(present)
        for k, contender in enumerate(present):
            points = [
                (batches.index(row["batch"]), summary(row["seconds_per_step"]), row["batch"])
                for row in rows
                if row["contender"] == contender
            ]
            places = [position + (k - (len(present) - 1) / 2) * width for position, _, _ in points]
            middles = [1e3 * middle / batch for _, (middle, _, _), batch in points]
            below = [1e3 * (middle - low) / batch for _, (middle, low, _), batch in points]
            above = [1e3 * (high - middle) / batch for _, (middle, _, high), batch in points]
            axis.bar(
                places,
                middles,
                width,
                yerr=[below, above],
                color=_COLOURS[contender],
                error_kw={"elinewidth": 0.8, "ecolor": "#444444"},
                label=contender,
            )
        axis.set_xticks(range(len(batches)), [f"batch {batch}" for batch in batches])
        axis.set_ylabel("milliseconds per step and image")
        axis.set_title(f"{title}: lower is faster", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_scaling(rows: list[dict[str, Any]], path: Path) -> None:
    """Every curve, with what a perfect machine would do from its first point on."""
    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure, axes = plt.subplots(2, 4, figsize=(13, 6))
    for axis, curve in zip(axes.flat, curves, strict=False):
        points = [(row["size"], summary(row["seconds"])) for row in rows if row["curve"] == curve]
        sizes = [size for size, _ in points]
        middles = [1e3 * middle for _, (middle, _, _) in points]
        axis.plot(sizes, _perfect(curve, sizes, middles[0]), "--", color="#999999", label="perfect")
        axis.fill_between(
            sizes,
            [1e3 * low for _, (_, low, _) in points],
            [1e3 * high for _, (_, _, high) in points],
            color="#9ecae1",
            alpha=0.6,
        )
        axis.plot(sizes, middles, "o-", color="#2171b5", label="median, and range")
        axis.set_title(curve, fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sizes, [str(size) for size in sizes])
        axis.tick_params(axis="y", which="both", labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(curves) :]:
        axis.axis("off")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center", frameon=False)
    figure.supylabel("milliseconds", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _perfect(curve: str, sizes: list[int], first: float) -> list[float]:
    if curve.endswith("weak"):
        return [first] * len(sizes)
    power = -1 if curve.endswith("strong") else 2 if curve == "image size" else 1
    return [first * (size / sizes[0]) ** power for size in sizes]
