"""What was measured, as a markdown table and as a picture."""

import statistics
from pathlib import Path
from typing import Any

import matplotlib

from benchmarks.timing import summary

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

__all__ = ["markdown", "plot"]

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
    for title, name in (
        ("Reverse loop, milliseconds a step", "sampling"),
        ("Training step, milliseconds", "training"),
    ):
        lines += ["", f"**{title}** (SimpleUNet, 64×64×3)", "", *_timed_table(results[name])]
    lines += ["", "**A step beyond the network** (1 × 8×8×3)", ""]
    lines += ["| | microseconds: median (low – high) | against the scan |", "|---|---|---|"]
    scan = statistics.median(results["overhead"][0]["seconds_per_step"])
    for row in results["overhead"]:
        middle, low, high = (1e6 * value for value in summary(row["seconds_per_step"]))
        lines.append(
            f"| {row['contender']} | {middle:.2f} ({low:.2f} – {high:.2f}) "
            f"| {middle / scan / 1e6:.0f} × |"
        )
    lines += ["", "**The compiled loop against the length of the chain** (batch 4)", ""]
    lines += ["| T | lines of program | temporary memory | to compile |", "|---|---|---|---|"]
    for row in results["growth"]:
        lines.append(
            f"| {row['timesteps']:,} | {row['program_lines']:,} "
            f"| {row['temporary_bytes'] / 2**20:.1f} MiB | {row['compile_s']:.1f} s |"
        )
    return "\n".join(lines) + "\n"


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
    """Time a step and image, one panel for sampling and one for training."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2))
    for axis, name, title in zip(
        axes, ("sampling", "training"), ("reverse loop", "training step"), strict=True
    ):
        rows = results[name]
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
        axis.set_ylabel("milliseconds a step and image")
        axis.set_title(f"{title}: lower is faster", fontsize=11)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=120)
    plt.close(figure)
