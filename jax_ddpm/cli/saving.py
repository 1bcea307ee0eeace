"""Checkpoints of a training: copied to the host between two steps, written beside the next ones."""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jax_ddpm.cli.config import TrainConfig, UsageError
from jax_ddpm.cli.resume import Place, what_is_saved
from jax_ddpm.cli.runs import CHECKPOINTS
from jax_ddpm.cpu import default_steps_per_dispatch
from jax_ddpm.io.checkpoint import Checkpoint, prune_checkpoints, restore, save_checkpoint
from jax_ddpm.training import TrainState
from jax_ddpm.training.hosts import is_writer, on_writer, to_writer

__all__ = ["Saver", "computed_by", "read_state", "steps_per_dispatch"]


class Saver:
    """Saves when told to, one at a time; entered around the training, so that none is left."""

    last: int | None
    """The step of the newest checkpoint that is on the disk or on its way there."""

    def __init__(self, place: Place, config: TrainConfig, mesh: Mesh) -> None:
        self._run, self._description = place.folder, place.description
        self._config, self._mesh = config, mesh
        self.last = place.checkpoint and place.checkpoint.step
        self._threads = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._threads.shutdown()
        if exception[0] is None:
            self.wait()

    def save(self, step: int, state: TrainState, extra: Mapping[str, Any]) -> None:
        """Save `state`, the one after `step` steps, and what belongs to it."""
        self.wait()
        trees = {"params": state.params, "ema": state.ema_params, "optimizer": state.opt_state}
        # Copies: the next step writes into the buffers of this one.
        arrays = to_writer(trees, self._mesh)
        key_data = to_writer(jax.random.key_data(state.key), self._mesh)
        if is_writer():
            key = {"impl": str(jax.random.key_impl(state.key)), "data": key_data.tolist()}
            by = computed_by(self._config, self._mesh)
            rest = {"key": key, **extra, "computed_by": by, "run": self._description}
            self._writing = self._threads.submit(self._write, step, arrays, rest)
        self.last = step

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises `UsageError` if it cannot be written."""
        writing, self._writing = self._writing, None
        on_writer(lambda: writing.result() if writing else None)

    def _write(self, step: int, arrays: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        folder = self._run / CHECKPOINTS
        try:
            save_checkpoint(folder, step, arrays, state)
            prune_checkpoints(folder, keep=self._config.keep, keep_every=self._config.keep_every)
        except ValueError as error:
            raise UsageError(f"step {step:,} is not saved: {error}") from None
        except OSError as error:
            raise UsageError(
                f"--out: cannot write {error.filename or folder}: {error.strerror}; "
                f"{what_is_saved(self._run)}"
            ) from None


def computed_by(config: TrainConfig, mesh: Mesh) -> str:
    """What decides the last bits of a training, as far as it is known."""
    kind = mesh.devices.flat[0].device_kind
    details = {
        "processes": jax.process_count(),
        "fsdp": config.fsdp,
        "steps a dispatch": steps_per_dispatch(config),
    }
    layout = "".join(f", {count} {what}" for what, count in details.items() if count > 1)
    return f"{mesh.size} × {kind}{layout}, jax {jax.__version__}"


def steps_per_dispatch(config: TrainConfig) -> int:
    """`--steps-per-dispatch`, or what suits the backend."""
    return config.steps_per_dispatch or default_steps_per_dispatch()


def read_state(checkpoint: Checkpoint, template: TrainState) -> TrainState:
    """The state that was saved, on the host. Raises `UsageError` if it is another model's."""

    def tree(name, expected):
        try:
            return restore(expected, checkpoint.arrays[name])
        except (KeyError, ValueError) as error:
            raise UsageError(
                f"--accept-changes: the checkpoint of step {checkpoint.step:,} is of another "
                f"network ({name}: {error}); --name begins another run"
            ) from None

    key = checkpoint.state["key"]
    return TrainState(
        step=jnp.int32(checkpoint.step),
        params=tree("params", template.params),
        ema_params=tree("ema", template.ema_params),
        opt_state=tree("optimizer", template.opt_state),
        key=jax.random.wrap_key_data(jnp.asarray(key["data"], jnp.uint32), impl=key["impl"]),
    )
