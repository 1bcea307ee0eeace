"""The accelerator's record as markdown."""

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.accelerator_rows import Row
from benchmarks.timing import summary

__all__ = ["markdown"]

_KINDS = {
    "maths": "schedule, q, p, losses",
    "forward": "SimpleUNet: output",
    "gradients": "SimpleUNet: gradient of every parameter",
    "training": "SimpleUNet: Adam steps, weights and losses",
    "chain": "SimpleUNet: reverse chain, every state",
    "attention": "attention: output and gradients",
    "unet": "UNet: output",
}


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
