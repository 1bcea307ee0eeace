"""The training step: its time against torch's, and what checkpoints add.

    training            the tutorial's step, milliseconds
    cifar10_training    that of `ddpm_cifar10`, 35.7 M parameters
    checkpoints         a hundred steps of the default training, with a checkpoint and without

Both sides compute loss, gradient and its norm, Adam's step, and the average of the weights (Ho et
al. 2020, §4). A timed run of JAX's is one scan, as a loop of one's own would be; torch's is a loop
in Python. The losses of the first few steps are compared, on the same weights and noise. For the
times, each side draws its own noise.
"""

import itertools
import tempfile
from functools import partial
from pathlib import Path

import jax
import numpy as np

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.harness import Log, Race, Row, Settings, interleave, timed
from benchmarks.networks import CIFAR10, TUTORIAL, Network
from jax_ddpm import runs
from jax_ddpm.data import Dataset
from jax_ddpm.runs.initial import new_run
from jax_ddpm.runs.programs import fit_programs
from jax_ddpm.runs.training import Saver
from jax_ddpm.training.sharding import device_mesh
from torch_reference.schedule import T

__all__ = ["checkpoints", "cifar10_training", "training"]

TOLERANCE = 1e-3
"""Of the losses of three steps, float32, as `parity/tolerances.py` allows Adam; measured 4e-5."""

_COMPARED_STEPS = 3

_CIFAR10_RATE = 1e-5
"""Adam divides rounding by itself, and every step magnifies it: at 1e-3 the losses of eager and
compiled torch are 1.1e-2 apart after two steps, at this rate 3e-4, where a step changes them by
8e-3."""


def training(settings: Settings, log: Log = print) -> list[Row]:
    """The tutorial's step, at every batch size; raises `Disagreement` if losses differ."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    rows = []
    for batch in settings.training_batches:
        steps = max(_COMPARED_STEPS, settings.training_steps // batch)
        rows += _race(TUTORIAL, schedule, batch, 1e-3, steps, settings.rounds, log)
    return rows


def cifar10_training(settings: Settings, log: Log = print) -> list[Row]:
    """The large network's step, at every batch size; raises `Disagreement` if losses differ."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    rows = []
    for batch in settings.cifar10_training_batches:
        rounds = settings.cifar10_rounds
        rows += _race(CIFAR10, schedule, batch, _CIFAR10_RATE, 4, rounds, log)
    return rows


def _race(
    network: Network,
    schedule: ddpm.NoiseSchedule,
    batch: int,
    learning_rate: float,
    steps: int,
    rounds: int,
    log: Log,
) -> list[Row]:
    """Every contender's rows at one batch size; `steps` of a timed run, 3 or more."""
    work = *_, images = sides.jax_training(network, schedule, batch, learning_rate)
    race = Race(f"{network.name} training, batch {batch}", sides.REFERENCE, TOLERANCE, log)
    for name, sharding in sides.jax_contenders(batch).items():
        trainer, seconds = timed(partial(sides.JaxTrainer, *work, sharding, steps))
        output = np.array(trainer.run(steps)[:_COMPARED_STEPS])
        race.enter(name, partial(trainer.run, steps), output, seconds, sharding)

    for name, (channels_last, wrap) in sides.torch_contenders(large=network.large).items():
        trainer = sides.TorchTrainer(network, schedule, wrap, images, channels_last, learning_rate)
        given = sides.drawn_by_jax(schedule, images, channels_last, _COMPARED_STEPS)
        first, seconds = timed(partial(trainer.run, given[:1]))
        output = np.array(first + trainer.run(given[1:]))
        race.enter(name, partial(trainer.run, [None] * steps), output, seconds)
    return race.run(batch, steps, rounds)


def checkpoints(settings: Settings, log: Log = print) -> list[Row]:
    """Time as many steps as lie between two checkpoints by default, with a save among them."""
    trained = runs.Settings()
    steps, batch = trained.checkpoint_every, trained.batched()
    images = np.random.default_rng(0).uniform(-1, 1, (batch, 8, 8, 1)).astype(np.float32)
    labels = np.arange(batch, dtype=np.int32) % 10
    run = new_run(trained, Dataset(images, labels))
    mesh = device_mesh(batch)
    programs = fit_programs(run, trained, mesh, jax.random.key(2))
    state = programs.init(jax.device_get(run.variables))
    arrays = {"images": images[None], "labels": labels[None]}
    batches = jax.device_put(arrays, programs.batch_sharding)
    numbers = itertools.count()

    def train():
        nonlocal state
        for _ in range(steps):
            state, _ = programs.advance(state, batches)
        jax.block_until_ready(state)

    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), trained)

        def train_and_save():
            saver.save(state, next(numbers), {})
            train()
            saver.wait()

        log(f"checkpoints: {steps} steps …")
        times = interleave({"without": train, "with": train_and_save}, settings.cifar10_rounds)
    return [
        {"contender": name, "batch": batch, "steps": steps, "seconds": seconds}
        for name, seconds in times.items()
    ]
