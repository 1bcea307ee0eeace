"""What was measured, as a markdown table and as a picture."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.processes import median
from benchmarks.ratios import ratios
from benchmarks.timing import summary

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

__all__ = ["markdown", "plot", "plot_scaling"]

_EAGER, _COMPILED = "torch eager", "torch.compile, channels_last"
_COLOURS = {
    "JAX jit": "#9ecae1",
    "JAX jit, sharded over cores": "#2171b5",
    "torch eager": "#fdd0a2",
    "torch eager, channels_last": "#fdae6b",
    "torch.compile": "#f16913",
    "torch.compile, channels_last": "#a63603",
}


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
        spread = f" ({min(ratio.rounds):.2f} – {max(ratio.rounds):.2f})"
        lines.append(
            f"| {ratio.work} | {ratio.batch} | {ratio.middle:.2f} ×"
            f"{spread if len(ratio.rounds) > 1 else ''} | {ratio.theirs} |"
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
        imports, rest = (median(rows, "start", name, field) for field in ("imports", "pictures"))
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
        ratios = [
            f"{medians[row['batch'], other] / own:.2f} ×"
            if (row["batch"], other) in medians
            else ""
            for other in (_EAGER, _COMPILED)
        ]
        compiled = "" if row["compile_s"] is None else f"{row['compile_s']:.1f} s"
        name = f"**{row['contender']}**" if row["contender"].startswith("JAX") else row["contender"]
        lines.append(
            f"| {row['batch']} | {name} | {middle:.1f} ({low:.1f} – {high:.1f}) | {compiled} "
            f"| {' | '.join(ratios)} |"
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
            points = []
            for position, batch in enumerate(batches):
                for row in rows:
                    if (row["batch"], row["contender"]) == (batch, contender):
                        points.append((position, summary(row["seconds_per_step"]), batch))
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
