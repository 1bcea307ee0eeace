"""Checkpoints of a training: copied to the host between two steps, written beside the next ones."""

import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.io.checkpoint import (
    Checkpoint,
    load_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
)
from jax_ddpm.runs.settings import CheckpointSettings
from jax_ddpm.training import TrainState
from jax_ddpm.training.hosts import gather_to_writer, is_writer, run_on_writer

_TREES = {"params": "params", "ema": "ema_params", "optimizer": "opt_state"}
"""Names of files, and of the fields of a `TrainState` that they hold."""


def save_state(folder: str | os.PathLike[str], state: TrainState) -> Path:
    """Write a whole `TrainState`, its typed key included, as the checkpoint of its step.

    Returns the checkpoint's folder, `folder/00000STEP`. Raises `ValueError` if a number is not
    finite, and `OSError`; whatever was there before is untouched then.
    """
    host = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
    return save_checkpoint(folder, int(state.step), _arrays(host), {"key": _key(state, host.key)})


def load_state(path: str | os.PathLike[str], like: TrainState) -> TrainState:
    """Read what `save_state` or a training wrote, onto the default device.

    `like` gives the structure: a state, or the shapes of one, such as
    `jax.eval_shape(init_train_state, key, params, optimizer)`. Raises `ValueError` naming the
    file or the array that is damaged, missing or of another shape.
    """
    return jax.tree.map(jnp.asarray, read_state(load_checkpoint(path), like))


def read_state(checkpoint: Checkpoint, like: TrainState) -> TrainState:
    """The state in a checkpoint, on the host. Raises `ValueError` if it is not one like `like`."""
    trees = {}
    for name, field in _TREES.items():
        try:
            trees[field] = restore(getattr(like, field), checkpoint.arrays[name])
        except KeyError:
            raise ValueError(f"{name}: expected its arrays, got none") from None
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    key = checkpoint.state["key"]
    data = jnp.asarray(key["data"], jnp.uint32)
    key = jax.random.wrap_key_data(data, impl=key["impl"])
    return TrainState(step=jnp.int32(checkpoint.step), key=key, **trees)


class Saver:
    """Saves when asked, one checkpoint at a time, in a thread; entered around a training, it waits
    for the last one."""

    last: int | None
    """The step of the newest checkpoint that is on the disk or on its way there."""

    def __init__(self, folder: Path, settings: CheckpointSettings, last: int | None = None) -> None:
        self._folder, self._settings, self.last = folder, settings, last
        self._threads = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._threads.shutdown()
        if exception[0] is None:
            self.wait()

    def save(
        self, state: TrainState, step: int, extra: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Save `state`, the one after `step` steps, and what belongs to it; with `keep_best`, that
        of the step `best` is kept."""
        self.wait()
        # Copies: the next step writes into the buffers of this one.
        arrays = gather_to_writer(_arrays(state))
        key_data = gather_to_writer(jax.random.key_data(state.key))
        if is_writer():
            rest = {"key": _key(state, key_data), **extra}
            self._writing = self._threads.submit(self._write, step, arrays, rest, best)
        self.last = step

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises what kept it from being written."""
        writing, self._writing = self._writing, None
        run_on_writer(lambda: writing.result() if writing else None)

    def _write(
        self, step: int, arrays: Mapping[str, Any], state: Mapping[str, Any], best: int | None
    ) -> None:
        try:
            save_checkpoint(self._folder, step, arrays, state)
        except ValueError as error:
            raise FieldError(None, f"step {step:,} is not saved: {error}") from None
        keep, keep_every = self._settings.keep, self._settings.keep_every
        also = (best,) if self._settings.keep_best else ()
        prune_checkpoints(self._folder, keep=keep, keep_every=keep_every, also=also)


def _arrays(state: TrainState) -> dict[str, Any]:
    return {name: getattr(state, field) for name, field in _TREES.items()}


def _key(state: TrainState, data: np.ndarray) -> dict[str, Any]:
    return {"impl": str(jax.random.key_impl(state.key)), "data": data.tolist()}
