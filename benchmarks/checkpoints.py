"""What checkpoints cost: a hundred steps of the default training, with one and without."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.settings import Settings
from benchmarks.timing import interleave
from jax_ddpm import runs
from jax_ddpm.data import Dataset
from jax_ddpm.runs.programs import fit_programs
from jax_ddpm.runs.saving import Saver
from jax_ddpm.runs.starting import new_run
from jax_ddpm.training.sharding import device_mesh

__all__ = ["run"]


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time as many steps as lie between two checkpoints by default, with a save among them."""
    trained = runs.Settings()
    steps, batch = trained.checkpoint_every, trained.batch_size
    images = np.random.default_rng(0).uniform(-1, 1, (batch, 8, 8, 1)).astype(np.float32)
    labels = np.arange(batch, dtype=np.int32) % 10
    run = new_run(trained, Dataset(images, labels))
    mesh = device_mesh(batch)
    programs = fit_programs(run, trained, mesh, jax.random.key(2))
    state = programs.init(jax.device_get(run.pretrained.variables))
    batches = jax.device_put((images[None], labels[None]), programs.batch_sharding)
    numbers = itertools.count()

    def train():
        nonlocal state
        for _ in range(steps):
            state, _ = programs.advance(state, batches)
        jax.block_until_ready(state)

    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), trained, mesh)

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
