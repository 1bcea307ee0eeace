"""The loop of `jax-ddpm train`: batches in, steps, and lines of metrics out.

host:    indices of k steps ─▶ each process loads its rows ─▶ one dispatch
devices: lax.scan over k training steps, the state donated
"""

import json
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from jax_ddpm.cli.config import TrainConfig
from jax_ddpm.cli.datasets import Dataset
from jax_ddpm.cli.programs import training
from jax_ddpm.cli.runs import Run
from jax_ddpm.training import TrainState, batch_indices, init_train_state, load_batch
from jax_ddpm.training.hosts import any_process, is_writer
from jax_ddpm.training.sharding import data_sharding, replicated

__all__ = ["fit"]

_LOG_EVERY = 50


def fit(config: TrainConfig, folder: Path, run: Run, data: Dataset, mesh: Mesh) -> TrainState:
    """Train; Ctrl-C ends it early with what there is."""
    data_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    optimizer = _optimizer(config)
    train_step, placement = training(
        run,
        optimizer,
        mesh,
        ema_decay=_young(config.ema_decay),
        label_dropout=config.label_dropout,
        accumulate=config.accumulate,
    )

    @partial(jax.jit, out_shardings=placement)
    def init(params):
        return init_train_state(train_key, params, optimizer)

    state = init(jax.device_get(run.pretrained.variables))

    # One dispatch: a scan over the steps whose batches it is given.
    advance = jax.jit(
        lambda state, batches: lax.scan(train_step, state, batches),
        donate_argnums=0,
        out_shardings=(placement, replicated(mesh)),
    )

    @jax.jit
    def order(steps):
        return jax.vmap(
            lambda step: batch_indices(data_key, step, len(data.images), config.batch_size)
        )(steps)

    def batches(steps: range) -> Any:
        indices = np.asarray(order(np.arange(steps.start, steps.stop)))
        sharding = NamedSharding(mesh, P(None, *data_sharding(mesh).spec))
        images = load_batch(data.images, indices, sharding)
        if run.num_classes is None:
            return images
        assert data.labels is not None
        return images, load_batch(data.labels, indices, sharding)

    at_once = config.steps_per_dispatch or (1 if jax.default_backend() == "cpu" else 10)
    with _Log(folder, config.steps) as log, _interrupts() as interrupted:
        for start in range(0, config.steps, at_once):
            steps = range(start, min(start + at_once, config.steps))
            state, metrics = advance(state, batches(steps))
            log.add(steps, metrics)
            # Several processes agree to stop where they wait anyway: at a line of the log.
            together = log.is_due or jax.process_count() == 1
            stop = together and any_process(bool(interrupted))
            if log.is_due or stop:
                log.write()
            if stop:
                log.say(f"stopped at step {steps.stop:,}")
                break
    return state


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    warmup = min(100, config.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, warmup, config.steps)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(rate))


def _young(decay: float) -> optax.Schedule:
    """A young average forgets fast, or a short run would sample its start."""
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


class _Log:
    """Means over the last 50 steps or so, in metrics.jsonl and beside the progress bar."""

    def __init__(self, folder: Path, total: int) -> None:
        self._file = (folder / "metrics.jsonl").open("w") if is_writer() else None
        self._progress = tqdm(total=total, desc="training", unit="step", disable=not is_writer())
        self._total = total
        self._recent: list[dict[str, jax.Array]] = []
        self._step = self._written = 0
        self._since = time.perf_counter()

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.close()
        if self._file is not None:
            self._file.close()

    def add(self, steps: range, metrics: dict[str, jax.Array]) -> None:
        """What a dispatch will have measured, [step] each; it is not waited for."""
        self._recent.append(metrics)
        self._step = steps.stop

    @property
    def is_due(self) -> bool:
        """Whether a multiple of 50 was passed, or the end is reached."""
        passed = self._step // _LOG_EVERY > self._written // _LOG_EVERY
        return passed or self._step == self._total

    def write(self) -> None:
        """Wait for the steps so far, and write their line."""
        measured = jax.device_get(self._recent)
        means = {
            name: float(np.mean(np.concatenate([each[name] for each in measured])))
            for name in measured[0]
        }
        now, count = time.perf_counter(), self._step - self._written
        line = {"step": self._step, **means}
        line["steps_per_second"] = round(count / (now - self._since), 2)
        if self._file is not None:
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()
        self._progress.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
        self._progress.update(count)
        self._recent, self._written, self._since = [], self._step, now

    def say(self, line: str) -> None:
        """A line above the progress bar."""
        if is_writer():
            self._progress.write(line)


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """Gathers Ctrl-C: an exception inside a step would leave its donated state deleted."""
    interrupted: list[bool] = []
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.append(True))
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
