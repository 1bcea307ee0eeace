"""What the cores do during a step, by XLA's own profile of it.

Each program runs once under JAX's profiler. The time of every instruction, on all devices, is added
up by what the instruction is for:

    products    convolutions and matrix products, forward and backward
    network     whatever else the network and its gradient are made of: norms, copies, sums
    update      the rest of a step: noise, losses, Adam, the average of the weights
    exchange    sums over devices, waiting for the other included

Beside it stand the rates of the whole step, of its products, and of a large matrix product. A batch
that does not split over the cores runs on one device, whose threads look the same to the profile.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks import contenders as sides
from benchmarks.harness import Contender, Row, cores, say, timed

KINDS = ("products", "network", "update", "exchange")
_STEPS = {"tutorial": 20, "ddpm_cifar10": 3}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*)$", re.MULTILINE)
_COMPUTATION = re.compile(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


def profile(full: bool) -> list[Row]:
    """A row for each program, and one for a large matrix product."""
    rows: list[Row] = [{"what": "a large product", "gflop_per_second_and_core": _peak()}]
    builders = {"reverse loop": sides.jax_loop, "training step": sides.jax_training}
    for network in (sides.TUTORIAL, sides.CIFAR10):
        steps = _STEPS[network.name]
        for work, build in builders.items():
            for batch in (1, 4, 8, 16, 64) if full else (1, 4, 16):
                say(f"{network.name} {work}, batch {batch} …")
                sharding = sides.over_cores(batch)
                program = build(network, steps, batch, sharding)
                found, seconds = _profiled(program)
                rate = program.flops / seconds / cores() / 1e9
                row: Row = {"what": f"{network.name} {work}", "batch": batch}
                row |= {"seconds_per_step": seconds / steps, "gflop_per_second_and_core": rate}
                if sharding is not None:
                    row["of_products"] = program.flops / found["products"] / 1e9
                    row |= {kind: f"{found[kind] / sum(found.values()):.0%}" for kind in KINDS}
                rows.append(row)
    return rows


def _profiled(program: Contender) -> tuple[dict[str, float], float]:
    """Seconds of each of `KINDS`, over all cores, in one run; and how long it took."""
    program.run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _, seconds = timed(program.run)
        [path] = Path(folder).rglob("*.xplane.pb")
        profiled = jax.profiler.ProfileData.from_file(str(path))
    spent: Counter[str] = Counter()
    for plane in profiled.planes:
        for line in plane.lines:
            for event in line.events:
                spent[event.name] += event.duration_ns / 1e9
    text = program.program.as_text()
    bodies = dict(_COMPUTATION.findall(text))
    found: dict[str, float] = {kind: 0.0 for kind in KINDS}
    for name, operation, rest in _INSTRUCTION.findall(text):
        # What these call is counted by itself.
        if name in spent and operation not in ("while", "call", "conditional"):
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            inside = f" {operation}(" + (bodies.get(called[1], "") if called else "")
            found[_kind(inside, rest)] += spent[name]
    return found, seconds


def _kind(inside: str, rest: str) -> str:
    if re.search(r" all-(reduce|gather)", inside):
        return "exchange"
    if re.search(r" (convolution|dot)\(", inside):
        return "products"
    return "network" if re.search(r'op_name="[^"]*UNet', rest) else "update"


def _peak(side: int = 2048, repeats: int = 10) -> float:
    """GFLOP/s a core of products of two matrices, one on each core at a time."""
    factors = jnp.full((cores(), side, side), 1 / side)
    factors = jax.device_put(factors, sides.over_cores(cores()))
    products = jax.jit(lambda x: lax.fori_loop(0, repeats, lambda _, x: x @ factors, x))
    seconds = [timed(lambda: jax.block_until_ready(products(factors)))[1] for _ in range(4)]
    return 2 * side**3 * repeats / min(seconds[1:]) / 1e9
