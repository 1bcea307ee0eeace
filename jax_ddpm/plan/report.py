"""What was measured, as lines to read."""

from collections.abc import Iterator, Sequence
from typing import Any


def notes(rows: Sequence[dict[str, Any]], platforms: Sequence[str]) -> Iterator[str]:
    """What a reader of these rows, of these platforms, has to know."""
    if any(row["fits"] for row in rows):
        yield (
            "estimate: the longest of the three times above it, at the chips' peak figures and "
            "without the time\nthat operations take to start. Real programs take longer."
        )
    if "cuda" in platforms:
        share = "unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise"
        yield f"Of a GPU's memory JAX takes 75 %, {share}."


def report(row: dict[str, Any]) -> str:
    """A block of lines about one program on one target."""
    images, devices, sampling = row["images"], row["devices"], row["work"] == "sample"
    what = f"{images:,} images"
    if sampling:
        what += f" × {row['steps']:,} steps"
    if devices > 1:
        what += f", {images // devices:,} images per device"
    plural = "s" if devices > 1 else ""
    lines = [f"{row['work']} on {row['target']}, {devices} device{plural}: {what}"]
    available = f"{_bytes(row['available'])} per device"
    if row["fits"]:
        lines.append(line("fits", _bytes(row["needed"]), f"of {available}"))
    elif row["needed"] is None:
        lines.append(line("does not fit", "", available))
    else:
        over = _bytes(row["needed"] - row["available"])
        lines.append(
            line("does not fit", _bytes(row["needed"]), f"of {available}: {over} too much")
        )
    if "refusal" in row:
        return "\n".join([*lines, f"  {row['refusal']}"])
    lines += [
        line("  arguments", _bytes(row["arguments"])),
        line("  outputs", _bytes(row["outputs"]), _given_back(row)),
        line("  temporaries", _bytes(row["temporaries"])),
    ]
    if row["code"]:
        lines.append(line("  program", _bytes(row["code"])))
    if not row["fits"]:
        return "\n".join(lines)
    seconds, rates = row["seconds"], row["rates"]
    lines += [
        line(
            "compute",
            _amount(row["flops"], "FLOP"),
            f"{_time(seconds['compute'])} at {_amount(rates['compute'], 'FLOP/s')} in "
            f"{row['products']}",
        ),
        line(
            "memory traffic",
            _amount(row["traffic"], "B"),
            f"{_time(seconds['memory'])} at {_amount(rates['memory'], 'B/s')}",
        ),
    ]
    for each in row["collectives"]:
        time = _time(each["sent"] / rates["interconnect"])
        rest = f"{time} at {_amount(rates['interconnect'], 'B/s')}"
        lines.append(line(f"{each['kind']} ×{each['times']:,}", _amount(each["nbytes"], "B"), rest))
    estimate = row["estimate"]
    speed = f"{_number(images / estimate)} images/s"
    if not sampling:
        speed = f"{_number(1 / estimate)} steps/s, {speed}"
    lines.append(line("estimate", _time(estimate), f"bound by {row['bound']}: at best {speed}"))
    return "\n".join(lines)


def _given_back(row: dict[str, Any]) -> str:
    if not row["aliased"]:
        return ""
    return f"{_bytes(row['aliased'])} of it in the arguments' place"


def line(name: str, value: str, rest: str = "") -> str:
    """A line of a report: a name, a number, and what is said beside it."""
    return f"  {name:<18}{value:>12}   {rest}".rstrip()


def _bytes(count: float) -> str:
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def _amount(count: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= factor:
            return f"{count / factor:,.3g} {prefix}{unit}"
    return f"{count / 1e3:,.3g} k{unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    for factor, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:,.3g} {unit}"
    return f"{seconds / 1e-6:,.3g} µs"
