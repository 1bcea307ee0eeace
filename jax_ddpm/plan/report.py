"""What was planned, as text to read."""

from collections.abc import Sequence

from jax_ddpm._table import table
from jax_ddpm.plan.compilation import Plan

NOTE = """
estimate: the longest of the three times above it, at the chips' peak figures and without the time
that operations take to start. Real programs take longer."""


def report(plan: Plan) -> str:
    """A block of lines about one program on one target."""
    target, images, devices, cost = plan.target, plan.images, plan.devices, plan.cost
    what = counted(images, "image")
    what += f" × {counted(plan.steps, 'step')}" if plan.work == "sample" else ""
    what += f", {counted(images // devices, 'image')} per device" if devices > 1 else ""
    limit = f"of {_bytes(target.memory)} per device"
    limit += ", 75 % of the GPU's" if target.chip.platform == "cuda" else ""
    if plan.needed is not None and not plan.fits:
        limit += f": {_bytes(plan.needed - target.memory)} too much"
    needed = "more" if plan.needed is None else _bytes(plan.needed)
    rows = [
        (f"{plan.work} on {target.name}, {counted(devices, 'device')}: {what}",),
        ("  fits" if plan.fits else "  does not fit", needed, limit),
    ]
    if cost is None:
        return table("<><", [*rows, (f"  {plan.refusal}",)])
    again = f"{_bytes(cost.aliased)} of it in the arguments' place" if cost.aliased else ""
    rows += [
        ("    arguments", _bytes(cost.arguments), ""),
        ("    outputs", _bytes(cost.outputs), again),
        ("    temporaries", _bytes(cost.temporaries), ""),
        *[("    program", _bytes(cost.code), "")] * bool(cost.code),
    ]
    if not plan.fits:
        return table("<><", rows)
    work = [("compute", "compute", cost.flops, cost.flops, "FLOP")]
    work.append(("memory", "memory traffic", cost.traffic, cost.traffic, "B"))
    for kind, times, nbytes, sent in cost.collectives:
        work.append(("interconnect", f"{kind} ×{times:,}", nbytes, sent, "B"))
    for kind, name, shown, amount, unit in work:
        time = _time(amount / cost.rates[kind])
        rate = _amount(cost.rates[kind], f"{unit}/s")
        rate += f" in {plan.products}" if kind == "compute" else ""
        rows.append((f"  {name}", _amount(shown, unit), f"{time} at {rate}"))
    speed = f"{_number(1 / cost.estimate)} steps/s, " if plan.work == "train" else ""
    speed += f"{_number(images / cost.estimate)} images/s"
    bound = f"bound by {cost.bound}: at best {speed}"
    return table("<><", [*rows, ("  estimate", _time(cost.estimate), bound)])


def counted(number: int, noun: str) -> str:
    """`1 image`, `1,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _bytes(count: float) -> str:
    return _scaled(count / 2**10, ("KiB", "MiB", "GiB"), 2**10, ",.2f")


def _amount(count: float, unit: str) -> str:
    return _scaled(count / 1e3, [f"{prefix}{unit}" for prefix in "kMGTP"])


def _time(seconds: float) -> str:
    return _scaled(seconds * 1e6, ("µs", "ms", "s"))


def _scaled(value: float, units: Sequence[str], base: int = 1000, form: str = "") -> str:
    """In the largest of these units that leaves 1 or more."""
    power = 0
    while value >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{format(value, form) if form else _number(value)} {units[power]}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
