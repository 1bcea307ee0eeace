"""What the cores do during a step, by XLA's own profile of it: `python -m benchmarks.profile`.

Each program runs once under JAX's profiler. The time of every instruction, on all devices, is added
up by what the instruction is for:

    products    convolutions and matrix products, forward and backward
    network     whatever else the network and its gradient are made of: norms, copies, sums
    update      the rest of a step: noise, losses, Adam, the average of the weights
    exchange    sums over devices, waiting for the other included

Beside it stand the rates of the whole step and of its products alone, and above the table that of a
large matrix product on the same cores. A batch that does not split over the cores runs on one
device, whose threads the profile does not tell apart.
"""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.harness import cores, timed
from benchmarks.networks import CIFAR10, TUTORIAL, Network
from jax_ddpm.plan.hlo import count_flops
from torch_reference.schedule import T

__all__ = ["KINDS", "main", "profile", "shares"]

KINDS = ("products", "network", "update", "exchange")
_STEPS = {"tutorial": 20, "ddpm_cifar10": 3}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*? ([a-z][\w\-]*)\((.*)$", re.MULTILINE)
_COMPUTATION = re.compile(r"^%?([\w.\-]+) [^\n]*\{\n(.*?)^\}", re.MULTILINE | re.DOTALL)


def main(argv: list[str] | None = None) -> None:
    """Print a line for each program."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 8, 16, 64])
    batches = parser.parse_args(argv).batches
    jax.config.update("jax_num_cpu_devices", cores())
    print(
        f"jax {jax.__version__}, {cores()} cores; a large product: {_peak():.0f} GFLOP/s a core\n"
    )
    print("| | batch | ms a step | GFLOP/s a core | of products |", " | ".join(KINDS), "|")
    print("|" + "---|" * (5 + len(KINDS)))
    for network in (TUTORIAL, CIFAR10):
        for work, build in (("reverse loop", _loop), ("training step", _training)):
            for batch in batches:
                run, program, flops = build(network, batch, _STEPS[network.name])
                found, seconds = profile(run, program)
                cells = [f"{network.name} {work}", str(batch)]
                milliseconds = 1e3 * seconds / _STEPS[network.name]
                cells.append(f"{milliseconds:,.{0 if milliseconds >= 100 else 1}f}")
                cells.append(f"{flops / seconds / cores() / 1e9:.0f}")
                if sides.over_cores(batch) is None:
                    cells += ["–"] * (1 + len(KINDS))
                else:
                    cells.append(f"{flops / found['products'] / 1e9:.0f}")
                    cells += [f"{found[kind] / sum(found.values()):.0%}" for kind in KINDS]
                print("|", " | ".join(cells), "|", flush=True)


def profile(run: Callable[[], object], program: str) -> tuple[dict[str, float], float]:
    """Seconds of each of `KINDS`, over all cores, in one run; and how long it took."""
    run()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            _, seconds = timed(run)
        [path] = Path(folder).rglob("*.xplane.pb")
        profiled = jax.profiler.ProfileData.from_file(str(path))
    spent: Counter[str] = Counter()
    for plane in profiled.planes:
        for line in plane.lines:
            for event in line.events:
                spent[event.name] += event.duration_ns / 1e9
    return shares(spent, program), seconds


def shares(spent: Mapping[str, float], program: str) -> dict[str, float]:
    """`spent`, seconds of instructions by name, by what they do in `program`, an HLO text."""
    bodies = dict(_COMPUTATION.findall(program))
    found: dict[str, float] = {kind: 0.0 for kind in KINDS}
    for name, operation, rest in _INSTRUCTION.findall(program):
        # What these call is counted by itself.
        if name in spent and operation not in ("while", "call", "conditional"):
            called = re.search(r"calls=%?([\w.\-]+)", rest)
            inside = f" {operation}(" + (bodies.get(called[1], "") if called else "")
            found[_kind(inside, rest)] += spent[name]
    return found


def _kind(inside: str, rest: str) -> str:
    if re.search(r" all-(reduce|gather)", inside):
        return "exchange"
    if re.search(r" (convolution|dot)\(", inside):
        return "products"
    return "network" if re.search(r'op_name="[^"]*UNet', rest) else "update"


def _loop(network: Network, batch: int, steps: int) -> tuple[Any, str, float]:
    sharding, shape = sides.over_cores(batch), (batch, *network.image_shape)
    loop = sides.reverse_loop(network, sides.chain(steps), shape, sharding)
    arguments = jax.device_put((jax.random.key(0), network.variables()), sides.whole(sharding))
    traced = loop.trace(*arguments)
    program, flops = traced.lower().compile(), count_flops(traced.jaxpr)
    return lambda: jax.block_until_ready(program(*arguments)), program.as_text(), flops


def _training(network: Network, batch: int, steps: int) -> tuple[Any, str, float]:
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    step, state, images = sides.jax_training(network, schedule, batch, 1e-5)
    trainer = sides.JaxTrainer(step, state, images, sides.over_cores(batch), steps)
    flops = steps * count_flops(jax.make_jaxpr(step)(state, images))
    return lambda: trainer.run(steps), trainer.program.as_text() or "", flops


def _peak(side: int = 2048, repeats: int = 10) -> float:
    """GFLOP/s a core of products of two matrices, one on each core at a time."""
    count = cores()
    factors = jax.device_put(jnp.full((count, side, side), 1 / side), sides.over_cores(count))

    @jax.jit
    def products(x):
        return lax.scan(lambda x, _: (x @ factors, None), x, length=repeats)[0]

    run = lambda: jax.block_until_ready(products(factors))  # noqa: E731
    run()
    seconds = min(timed(run)[1] for _ in range(3))
    return 2 * side**3 * repeats / seconds / 1e9


if __name__ == "__main__":
    main()
