"""Reverse loop and training step on the accelerator, against torch on the same device.

For each network, batch and arithmetic: outputs are compared first, from the same weights and the
same noise; then the contenders take turns. torch.compile, which takes longest to begin, has races
of its own, against JAX, after the others.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.accelerator_estimate import estimate
from benchmarks.accelerator_networks import (
    ArithmeticName,
    Spec,
    autocast,
    network,
    set_torch_precision,
)
from benchmarks.accelerator_rows import Row, left_out, problem, release
from benchmarks.compare import max_relative_difference
from benchmarks.sampling import torch_step
from benchmarks.timing import interleave, timed
from benchmarks.training import _TorchTrainer as TorchTrainer
from jax_ddpm.parity.tolerances import REDUCED, TOLERANCES
from jax_ddpm.training import draw_step
from torch_reference.schedule import T

__all__ = ["JAX", "Race", "run", "schedule_of_races"]

JAX = "JAX"
LOOP, TRAINING = "reverse loop", "training step"
_COMPARED_STEPS = 3


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
    labels = race.labels(spec.name)
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
            release()
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
    release()
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
            release()

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


def _chain(spec: Spec) -> ddpm.NoiseSchedule:
    return ddpm.respace(ddpm.make_schedule(ddpm.linear_beta_schedule(T)), range(spec.chain))


def _jax_loop(race: Race, spec: Spec) -> Contender:
    both, schedule = network(spec, race.arithmetic), _chain(spec)
    shape = (race.batch, *spec.image_shape)

    @jax.jit
    def loop(key, variables):
        denoise_fn = partial(both.apply_fn, variables)
        return ddpm.p_sample_loop(key, schedule, denoise_fn, shape, clip_denoised=False)

    device = jax.devices()[0]
    arguments = jax.device_put((jax.random.key(0), both.variables()), device)
    traced = loop.trace(*arguments)
    program, seconds = timed(traced.lower().compile)
    facts: Row = {"compile_s": seconds}
    if not race.compiled:
        facts["estimate"] = estimate(
            device.device_kind, traced.jaxpr, program, race.arithmetic, spec.chain
        )

    def run(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(program(*arguments))

    return Contender(run, spec.chain, np.asarray(program(*arguments)), facts)


def _torch_loop(race: Race, spec: Spec, channels_last: bool, wrap: Callable) -> Contender:
    both, (size, *_) = network(spec, race.arithmetic), spec.image_shape
    shape = (race.batch, *spec.image_shape)
    module = both.torch_module(channels_last)
    forward: Any = partial(both.torch_output, module)
    step = wrap(autocast(race.arithmetic, torch_step(forward)))

    def draw(_: int) -> torch.Tensor:
        return sides.draw(race.batch, size, channels_last)

    def given(entry: int) -> torch.Tensor:
        """What JAX's loop draws at this entry."""
        return sides.nchw(ddpm.sample_noise(jax.random.key(0), entry, shape), channels_last)

    @torch.no_grad()
    def loop(noise_fn: Callable[[int], torch.Tensor]) -> torch.Tensor:
        x = noise_fn(spec.chain)
        for entry in reversed(range(spec.chain)):
            t = torch.full((race.batch,), entry, device=x.device)
            x = step(x, t, noise_fn(entry))
        sides.synchronize()
        return x

    def run(count: int) -> None:
        for _ in range(count):
            loop(draw)

    output, seconds = timed(partial(loop, given))
    facts: Row = {"compile_s": seconds} if race.compiled else {}
    return Contender(run, spec.chain, sides.nhwc(output), facts)


def _images(race: Race, spec: Spec) -> np.ndarray:
    return np.asarray(jax.random.normal(jax.random.key(1), (race.batch, *spec.image_shape)))


def _jax_training(race: Race, spec: Spec) -> Contender:
    both, optimizer = network(spec, race.arithmetic), optax.adam(spec.learning_rate)
    state = ddpm.init_train_state(jax.random.key(0), both.variables(), optimizer)
    step = ddpm.make_train_step(_schedule(), both.apply_fn, optimizer)
    images = _images(race, spec)
    trainer, seconds = timed(partial(sides.JaxTrainer, step, state, images, None))
    facts: Row = {"compile_s": seconds}
    if not race.compiled:
        jaxpr, kind = jax.make_jaxpr(step)(state, images), jax.devices()[0].device_kind
        facts["estimate"] = estimate(kind, jaxpr, trainer.program, race.arithmetic, 1)
    return Contender(trainer.run, 1, np.array(trainer.run(_COMPARED_STEPS)), facts)


def _torch_training(race: Race, spec: Spec, channels_last: bool, wrap: Callable) -> Contender:
    both, images = network(spec, race.arithmetic), _images(race, spec)
    # What JAX's steps draw depends on the key and the step alone.
    state = ddpm.init_train_state(jax.random.key(0), {}, optax.identity())

    def whole(function: Callable) -> Callable:
        return wrap(autocast(race.arithmetic, function))

    trainer = TorchTrainer(both, _schedule(), whole, images, channels_last, spec.learning_rate)
    given = []
    for number in range(_COMPARED_STEPS):
        numbered = state._replace(step=jnp.asarray(number, jnp.int32))
        t, noise = draw_step(numbered, _schedule(), jnp.asarray(images))
        t = torch.from_numpy(np.array(t)).to(sides.torch_device())
        given.append((t, sides.nchw(noise, channels_last)))
    first, seconds = timed(partial(trainer.run, given[:1]))
    output = np.array(first + trainer.run(given[1:]))
    facts: Row = {"compile_s": seconds} if race.compiled else {}
    return Contender(lambda count: trainer.run([None] * count), 1, output, facts)


def _schedule() -> ddpm.NoiseSchedule:
    return ddpm.make_schedule(ddpm.linear_beta_schedule(T))
