"""What checkpoints cost: a hundred steps of the default training, with one and without."""

import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from benchmarks.settings import Settings
from benchmarks.timing import interleave
from jax_ddpm.cli.config import TrainConfig
from jax_ddpm.cli.programs import training
from jax_ddpm.cli.resume import Place
from jax_ddpm.cli.runs import Run, describe, init_variables, named_schedule
from jax_ddpm.cli.saving import Saver
from jax_ddpm.interop import Pretrained
from jax_ddpm.models import ddpm_digits
from jax_ddpm.training import init_train_state
from jax_ddpm.training.sharding import data_sharding, device_mesh, replicated

__all__ = ["run"]


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time as many steps as lie between two checkpoints by default, with a save among them."""
    config = TrainConfig()
    steps, batch, shape = config.checkpoint_every, config.batch_size, (8, 8, 1)
    variables = init_variables(ddpm_digits(), jax.random.key(0), shape)
    pretrained = Pretrained(ddpm_digits(), variables, named_schedule("cosine", 200))
    described = Run(pretrained, shape, num_classes=10, null_label=10, guidance=2.0)
    mesh = device_mesh(batch)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    train_step, placement = training(described, optimizer, mesh, skip_nonfinite=True)
    advance = jax.jit(train_step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
    images = jax.random.normal(jax.random.key(1), (batch, *shape))
    batches = jax.device_put((images, np.arange(batch) % 10), data_sharding(mesh))
    state = jax.device_put(init_train_state(jax.random.key(2), variables, optimizer), placement)
    numbers = itertools.count()

    def train():
        nonlocal state
        for _ in range(steps):
            state, _ = advance(state, batches)
        jax.block_until_ready(state)

    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), describe(described, config), None)
        saver = Saver(place, config, mesh)

        def train_and_save():
            saver.save(next(numbers), state, {"pending": {}})
            train()
            saver.wait()

        log(f"checkpoints: {steps} steps …")
        times = interleave({"without": train, "with": train_and_save}, settings.cifar10_rounds)
    return [
        {"contender": name, "batch": batch, "steps": steps, "seconds": seconds}
        for name, seconds in times.items()
    ]
