"""Reverse loop and training step on the accelerator, against torch on the same device.

For each network, batch and arithmetic: outputs are compared first, from the same weights and the
same noise; then the contenders take turns. torch.compile, which takes longest to begin, has races
of its own, against JAX, after the others. Beside JAX's time stands `jax-ddpm plan`'s estimate.
"""

import gc
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.harness import Row, interleave, left_out, max_relative_difference, problem, timed
from benchmarks.networks import ArithmeticName, Spec, autocast, set_torch_precision
from jax_ddpm.parity.tolerances import REDUCED, TOLERANCES
from jax_ddpm.plan.hlo import count_flops, memory_traffic
from jax_ddpm.plan.targets import parse_target
from torch_reference.schedule import T

__all__ = ["Race", "chip_of", "estimate", "run", "schedule_of_races"]

JAX = "JAX"
LOOP, TRAINING = "reverse loop", "training step"
_COMPARED_STEPS = 3
# Whole names, since others that begin alike are other chips: H100 PCIe, A100-SXM4-40GB, L40S.
_CHIPS = {
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA L4": "l4",
    "TPU v3": "v3",
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


class Race(NamedTuple):
    """One row of contenders: the same work at the same batch in the same arithmetic."""

    part: str
    """The network, as the command line calls it."""
    work: str
    batch: int
    arithmetic: ArithmeticName
    compiled: bool
    """Against torch.compile, and not against eager torch."""

    def labels(self, name: str) -> Row:
        """What every row of this race says; `name` is the network's."""
        return {
            "part": self.part,
            "network": name,
            "work": self.work,
            "batch": self.batch,
            "arithmetic": self.arithmetic,
            "against": "torch.compile" if self.compiled else "torch eager",
        }


class Contender(NamedTuple):
    """One side, ready: `run(n)` does n units, of `steps` steps each, and waits for them."""

    run: Callable[[int], object]
    steps: int
    output: np.ndarray
    facts: Row


def schedule_of_races(backend: str, batches: tuple[int, ...]) -> list[Race]:
    """Every race, most important first; `batches` too are in that order."""
    first, *others = batches

    def races(name: str, batch: int, *arithmetics: ArithmeticName, compiled=False) -> list[Race]:
        return [
            Race(name, work, batch, arithmetic, compiled)
            for work in (LOOP, TRAINING)
            for arithmetic in arithmetics
        ]

    both: tuple[ArithmeticName, ...] = ("bfloat16", "float32")
    small, large = "tutorial", "ddpm_cifar10"
    found = races(small, first, *both) + races(large, first, *both)
    found += races(small, first, "bfloat16", compiled=True)
    found += races(large, first, "bfloat16", compiled=True)
    for name in (small, large):
        for batch in others:
            found += races(name, batch, *both)
    if backend == "gpu":
        found += races(small, first, "TF32") + races(large, first, "TF32")
    found += races(small, first, "float32", compiled=True)
    found += races(large, first, "float32", compiled=True)
    for name in (small, large):
        for batch in others:
            found += races(name, batch, *both, compiled=True)
    return found


def run(race: Race, spec: Spec, *, rounds: int, least: float) -> list[Row]:
    """A row for each contender; `least` is the seconds that a timed run takes, or two steps."""
    labels = race.labels(spec.network.name)
    rows: list[Row] = []
    if reason := spec.torch_missing:
        rows.append(left_out({**labels, "contender": labels["against"]}, reason))
        if race.compiled:
            return rows
    set_torch_precision(race.arithmetic)
    ready: dict[str, Contender] = {}
    for name, build in _builders(race, spec, torch_here=reason is None).items():
        try:
            ready[name] = build()
        except Exception as error:
            rows.append(problem({**labels, "contender": name}, error))
            _release()
    tolerance = _tolerance(race)
    rows += _compare(labels, ready, tolerance)
    times = _take_turns(labels, ready, rows, rounds, least)
    rows += [
        {
            **labels,
            "contender": name,
            "status": "timed",
            "tolerance": tolerance,
            **ready[name].facts,
            "seconds_per_step": seconds,
        }
        for name, seconds in times.items()
    ]
    ready.clear()
    _release()
    return rows


def _compare(labels: Row, ready: dict[str, Contender], tolerance: float) -> list[Row]:
    """Take out of `ready` whose output is not torch's; a row for each of them."""
    rows: list[Row] = []
    reference = next((name for name in ready if name != JAX), None)
    if reference is None:
        return rows
    for name in [name for name in ready if name != reference]:
        difference = max_relative_difference(ready[name].output, ready[reference].output)
        if difference <= tolerance:
            ready[name].facts["difference"] = difference
            continue
        said = f"differs from {reference} by {difference:.1e}, allowed {tolerance:.0e}"
        rows.append({**labels, "contender": name, "status": "failed", "problem": said})
        del ready[name]
    return rows


def _take_turns(
    labels: Row, ready: dict[str, Contender], rows: list[Row], rounds: int, least: float
) -> dict[str, list[float]]:
    """Seconds a step in each round. Who fails on the way gets a row and no more turns."""
    failed: set[str] = set()
    units: dict[str, int] = {}

    def turn(name: str) -> None:
        if name in failed:
            return
        contender = ready[name]
        try:
            if name not in units:
                contender.run(1)
                _, seconds = timed(partial(contender.run, 1))
                units[name] = math.ceil(max(least / seconds, 2 / contender.steps))
            else:
                contender.run(units[name])
        except Exception as error:
            failed.add(name)
            rows.append(problem({**labels, "contender": name}, error))
            _release()

    # The untimed round that comes first finds out how many units are enough.
    times = interleave({name: partial(turn, name) for name in ready}, rounds)
    return {
        name: [each / (units[name] * ready[name].steps) for each in seconds]
        for name, seconds in times.items()
        if name not in failed
    }


def _tolerance(race: Race) -> float:
    kind = "chain" if race.work == LOOP else "training"
    if race.arithmetic == "float32":
        return TOLERANCES[kind].float32
    return REDUCED[race.arithmetic][kind]


def _builders(race: Race, spec: Spec, *, torch_here: bool) -> dict[str, Callable[[], Contender]]:
    jax_side, torch_side = (
        (_jax_loop, _torch_loop) if race.work == LOOP else (_jax_training, _torch_training)
    )
    builders: dict[str, Callable[[], Contender]] = {JAX: partial(jax_side, race, spec)}
    if torch_here:
        for name, (channels_last, wrap) in sides.torch_contenders(large=True).items():
            if name.startswith("torch.compile") == race.compiled:
                builders[name] = partial(torch_side, race, spec, channels_last, wrap)
    return builders


def _jax_loop(race: Race, spec: Spec) -> Contender:
    network, device = spec.computing_in(race.arithmetic), jax.devices()[0]
    shape = (race.batch, *network.image_shape)
    loop = sides.reverse_loop(network, sides.chain(spec.chain), shape, clip_denoised=False)
    arguments = jax.device_put((jax.random.key(0), network.variables()), device)
    traced = loop.trace(*arguments)
    program, seconds = timed(traced.lower().compile)

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(program(*arguments))

    facts = _jax_facts(race, seconds, traced.jaxpr, program, spec.chain)
    return Contender(run, spec.chain, np.asarray(program(*arguments)), facts)


def _torch_loop(race: Race, spec: Spec, channels_last: bool, wrap: Callable) -> Contender:
    network = spec.computing_in(race.arithmetic)
    size, *_ = network.image_shape
    shape = (race.batch, *network.image_shape)
    forward: Any = partial(network.torch_output, network.torch_module(channels_last))
    step = wrap(autocast(race.arithmetic, sides.torch_step(forward)))

    def draw(_: int) -> torch.Tensor:
        return sides.draw(race.batch, size, channels_last)

    def given(entry: int) -> torch.Tensor:
        """What JAX's loop draws at this entry."""
        return sides.nchw(ddpm.sample_noise(jax.random.key(0), entry, shape), channels_last)

    def run(count: int) -> None:
        for _ in range(count):
            sides.torch_loop(step, draw, spec.chain)

    output, seconds = timed(partial(sides.torch_loop, step, given, spec.chain))
    return Contender(run, spec.chain, sides.nhwc(output), _torch_facts(race, seconds))


def _jax_training(race: Race, spec: Spec) -> Contender:
    network = spec.computing_in(race.arithmetic)
    step, state, images = sides.jax_training(network, _schedule(), race.batch, spec.learning_rate)
    trainer, seconds = timed(partial(sides.JaxTrainer, step, state, images, None))
    jaxpr = jax.make_jaxpr(step)(state, images)
    facts = _jax_facts(race, seconds, jaxpr, trainer.program, 1)
    return Contender(trainer.run, 1, np.array(trainer.run(_COMPARED_STEPS)), facts)


def _torch_training(race: Race, spec: Spec, channels_last: bool, wrap: Callable) -> Contender:
    network, schedule = spec.computing_in(race.arithmetic), _schedule()
    images = sides.images(network, race.batch)

    def whole(function: Callable) -> Callable:
        return wrap(autocast(race.arithmetic, function))

    rate = spec.learning_rate
    trainer = sides.TorchTrainer(network, schedule, whole, images, channels_last, rate)
    given = sides.drawn_by_jax(schedule, images, channels_last, _COMPARED_STEPS)
    first, seconds = timed(partial(trainer.run, given[:1]))
    output = np.array(first + trainer.run(given[1:]))
    facts = _torch_facts(race, seconds)
    return Contender(lambda count: trainer.run([None] * count), 1, output, facts)


def _jax_facts(race: Race, seconds: float, jaxpr: Any, program: Any, steps: int) -> Row:
    facts: Row = {"compile_s": seconds}
    if not race.compiled:
        kind = jax.devices()[0].device_kind
        facts["estimate"] = estimate(kind, jaxpr, program, race.arithmetic, steps)
    return facts


def _torch_facts(race: Race, seconds: float) -> Row:
    return {"compile_s": seconds} if race.compiled else {}


def _schedule() -> ddpm.NoiseSchedule:
    return ddpm.make_schedule(ddpm.linear_beta_schedule(T))


def _release() -> None:
    """Give back what nobody holds any more, so that the other side has the memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def chip_of(device_kind: str) -> str | None:
    """Plan's name of the chip that JAX calls `device_kind`; None if plan has no figures of it."""
    return _CHIPS.get(device_kind)


def estimate(device_kind: str, jaxpr: Any, compiled: Any, dtype: str, steps: int) -> dict[str, Any]:
    """`jax-ddpm plan`'s estimate of one of the `steps` that a run of `compiled` takes.

    Operations, bytes and, where the chip is known, seconds and what bounds them. A roofline: the
    longer of two times, operations and memory traffic at the chip's peak figures. Real programs are
    slower. Plan knows the products that a chip computes by default, which for float32 is TF32 on a
    GPU and bfloat16 on a TPU: at "highest" a float32 program cannot come near.
    """
    figures: dict[str, Any] = {
        "flops": count_flops(jaxpr) / steps,
        "traffic": memory_traffic(compiled.as_text()) / steps,
    }
    chip = chip_of(device_kind)
    if chip is None:
        return {**figures, "seconds": None, "why": f"plan has no figures of {device_kind!r}"}
    target = parse_target(chip)
    kind = "bfloat16" if dtype == "bfloat16" else "float32"
    rates = target.rates(kind)
    seconds = {
        "compute": figures["flops"] / rates["compute"],
        "memory": figures["traffic"] / rates["memory"],
    }
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        **figures,
        "chip": chip,
        "products": target.products(kind),
        "seconds": seconds[bound],
        "bound": bound,
    }
