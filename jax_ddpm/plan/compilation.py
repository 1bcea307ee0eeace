"""Compile for devices that are not here, and say what the program takes.

Without the hardware nothing can be run, so what the compiler does not say is estimated: a
roofline, the longest of three times at the chip's peak figures. Real programs are slower.
"""

import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jax_ddpm._errors import FieldError
from jax_ddpm._table import counted, table
from jax_ddpm.plan.hlo import Collective, collectives, flops_by_arithmetic, memory_traffic
from jax_ddpm.plan.targets import Target


class Cost(NamedTuple):
    """What a program takes on each device: bytes, operations, and seconds at peak rates.

    `aliased` is what of the outputs takes the place of donated arguments, `traffic` the bytes from
    and to the device's memory; `rates` and `seconds` are of "compute" (FLOP/s, a mean over the
    arithmetic), "memory" and "interconnect" (bytes a second): the longest bounds the program.
    """

    arguments: int
    outputs: int
    aliased: int
    temporaries: int
    code: int
    flops: float
    traffic: float
    collectives: list[Collective]
    seconds_to_compile: float
    rates: dict[str, float]
    seconds: dict[str, float]
    bound: str
    estimate: float


class Plan(NamedTuple):
    """A program on a target, with `images` on all devices together: does it fit?

    `products` is the arithmetic of (most) matrix products, such as "TF32"; `needed` the bytes per
    device, where they are known. Where the compiler says that it does not fit, `refusal` are its
    words and there is no cost. `largest_batch` is the largest found to fit, and the smallest found
    not to.
    """

    target: Target
    devices: int
    work: Literal["train", "sample"]
    images: int
    steps: int
    dtype: str
    products: str = ""
    needed: int | None = None
    fits: bool = False
    refusal: str | None = None
    largest_batch: tuple[int, int | None] | None = None
    cost: Cost | None = None

    def record(self) -> dict[str, Any]:
        """As JSON: what there is of target and cost beside the rest."""
        row = {name: x for name, x in self._asdict().items() if x is not None or name == "needed"}
        row |= {"target": self.target.name, "chip": self.target.chip.title}
        row["available"] = self.target.memory
        if self.cost is not None:
            row |= self.cost._asdict()
            del row["cost"]
            row["collectives"] = [each._asdict() for each in self.cost.collectives]
        return row


def prepare() -> None:
    """Keep JAX off any hardware and the compilers off the network. Before JAX's first use."""
    jax.config.update("jax_platforms", "cpu")
    unset = {
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",  # these two only quiet it
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nobody's TPU is taken
    }
    os.environ.update(unset | os.environ)
    # There is no GPU to try algorithms on, and some products have no Triton kernel without.
    flags = os.environ.get("XLA_FLAGS", "")
    untried = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
    os.environ["XLA_FLAGS"] = f"{flags} {untried}".strip()


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what the compilers write to the error stream."""
    sys.stderr.flush()
    terminal = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)


@quiet()
def require_slice(target: Target) -> None:
    """Raises `FieldError` unless the compiler can sum over all devices of `target`."""
    try:
        devices = target.devices()
        split = NamedSharding(Mesh(devices, "all"), PartitionSpec("all"))
        numbers = jax.ShapeDtypeStruct((len(devices),), jnp.float32, sharding=split)
        jax.jit(jnp.sum).lower(numbers).compile()
    except RuntimeError as error:  # a JaxRuntimeError is one
        raise _refused(target, "such a slice", error) from None


def compile_for(plan: Plan, program: Any, arguments: tuple[Any, ...], runs: float) -> Plan:
    """The plan with what so many runs of a jitted function take; the memory is that of one.

    `arguments` are `ShapeDtypeStruct`s that are placed on the target's devices. Raises `FieldError`
    where the compiler takes no such program.
    """
    target, chip, settings = plan.target, plan.target.chip, jax.config
    traced = program.trace(*arguments)
    counted = flops_by_arithmetic(traced.jaxpr)
    plan = plan._replace(products=target.products(*counted.most_common(1)[0][0])[0])
    lowered = traced.lower(lowering_platforms=(chip.platform,))
    start, before = time.perf_counter(), settings.jax_optimization_level  # pyright: ignore
    if chip.platform == "tpu":
        # A minute where the default takes ten, and memory within a tenth of it. The setting is
        # JAX's: the compilers' own options change their names.
        settings.update("jax_optimization_level", "O1")
    try:
        compiled = lowered.compile()
    except RuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise _refused(target, "the program", error) from None
        size = re.search(r"([\d.]+)([KMGT])", message)
        needed = size and int(float(size[1]) * 2 ** (10 * " KMGT".index(size[2])))
        refusal = message.partition(": ")[2].partition("\n")[0]
        return plan._replace(needed=needed, refusal=refusal)
    finally:
        settings.update("jax_optimization_level", before)
    end, memory, text = time.perf_counter(), compiled.memory_analysis(), compiled.as_text()
    share, traffic, exchanged = (
        runs / plan.devices,
        memory_traffic(text, runs),
        collectives(text, runs),
    )
    seconds = {
        "compute": sum(n * share / target.products(*how)[1] for how, n in counted.items()),
        "memory": traffic / chip.bandwidth,
        "interconnect": sum(each.sent for each in exchanged) / chip.interconnect,
    }
    flops, bound = counted.total() * share, max(seconds, key=lambda name: seconds[name])
    peak = flops / seconds["compute"]
    cost = Cost(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        flops=flops,
        traffic=traffic,
        collectives=exchanged,
        seconds_to_compile=end - start,
        rates={"compute": peak, "memory": chip.bandwidth, "interconnect": chip.interconnect},
        seconds=seconds,
        bound=bound,
        estimate=seconds[bound],
    )
    needed = cost.arguments + cost.outputs - cost.aliased + cost.temporaries + cost.code
    return plan._replace(needed=needed, fits=needed <= target.memory, cost=cost)


def _refused(target: Target, what: str, error: RuntimeError) -> FieldError:
    complaint = str(error).partition("\n")[0].strip()
    return FieldError(None, f"{target.name}: its compiler refuses {what}: {complaint}")


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
