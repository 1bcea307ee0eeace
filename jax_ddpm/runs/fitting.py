"""Training on the disk: batches in, steps, lines of metrics and checkpoints out.

host:    indices of k steps ─▶ each process loads its rows ─▶ one dispatch
devices: lax.scan over k training steps, the state donated
"""

import itertools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ddpm._checks import Field, FieldError, checked
from jax_ddpm.data import Dataset, batch_indices, load_batch
from jax_ddpm.runs.metrics import MetricsLog
from jax_ddpm.runs.programs import fit_programs
from jax_ddpm.runs.resuming import Training, begin, open_run
from jax_ddpm.runs.run import CHECKPOINTS, METRICS, PathLike, Run
from jax_ddpm.runs.saving import Saver, read_state
from jax_ddpm.runs.settings import Settings
from jax_ddpm.runs.starting import computing
from jax_ddpm.training import TrainState
from jax_ddpm.training.hosts import any_process, on_writer, to_hosts

__all__ = ["Fit", "Progress", "fit", "train"]


class Progress(NamedTuple):
    """How far a training or a chain is."""

    done: int
    total: int
    line: dict[str, Any] | None = None
    """The line that was just added to metrics.jsonl: `step`, `loss`, `grad_norm` and
    `steps_per_second`."""


class Fit(NamedTuple):
    """Where a training ended."""

    run: Run
    """The model, with the average of the weights."""
    state: TrainState
    step: int
    stopped: bool
    """Whether it was asked to stop before its last step."""


@checked
def fit(
    folder: PathLike,
    data: Dataset,
    settings: Settings | None = None,
    *,
    accept_changes: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fit:
    """Train a model on images, in a folder that can be resumed: `jax-ddpm train` without pictures.

    Called again with the same arguments, after it was stopped or killed at any moment, it resumes
    and ends with the same weights to the bit (on the same devices). It warns of checkpoints that
    were damaged and set aside, and of other devices than before.

    Args:
      folder: of the run; made if need be.
      data: the images, as `load_dataset` reads them.
      settings: everything else. Default: `Settings()`.
      accept_changes: resume although settings or images are no longer those it began with.
      progress: called once the programs are compiled, and after every dispatch of steps.
      stop: asked after every dispatch; once it is true in any process, the training saves and
        ends there (several processes: at the next line of metrics or checkpoint).

    Raises:
      FieldError: naming the setting, or the file, that is wrong; where a loss or gradient is not
        finite (unless `on_nan="skip"`).
      OSError: something cannot be written. What was saved before is still there.
    """
    with open_run(folder, data, settings or Settings(), accept_changes=accept_changes) as training:
        for note in training.notes():
            warnings.warn(note, stacklevel=3)
        return train(training, progress, stop)


def train(
    training: Training,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fit:
    """Train what `open_run` opened, to its end or until `stop` is true, and save it."""
    _, settings, data, run, mesh, *_ = training
    key = jax.random.fold_in(jax.random.key(settings.seed), 0)
    data_key, train_key = jax.random.split(key)
    computed = computing(run, dtype=settings.dtype, remat=settings.remat)
    programs = fit_programs(computed, settings, mesh, train_key)
    checkpoint, done = training.checkpoint, training.step
    if checkpoint is None:
        state, pending = programs.init(jax.device_get(run.pretrained.variables)), {}
    else:
        pending = checkpoint.state["pending"]
        try:
            state = programs.to_devices(read_state(checkpoint, programs.state))
        except ValueError as error:
            problem = f"the checkpoint of step {done:,} is of another network ({error}); another "
            raise FieldError(
                "accept_changes", problem, Field("folder"), " begins another run"
            ) from None

    @jax.jit
    def order(steps):
        return jax.vmap(
            lambda step: batch_indices(data_key, step, len(data.images), settings.batch_size)
        )(steps)

    def batches(steps: range) -> Any:
        indices = np.asarray(order(np.arange(steps.start, steps.stop)))
        images = load_batch(data.images, indices, programs.batch_sharding)
        if run.num_classes is None:
            return images
        assert data.labels is not None
        return images, load_batch(data.labels, indices, programs.batch_sharding)

    def check(step: int | None) -> None:
        if step is None or settings.on_nan == "skip":
            return
        saver.wait()
        good = "no checkpoint was saved yet"
        if saver.last is not None:
            good = f"the last good checkpoint is of step {saver.last:,}"
        raise FieldError(
            None,
            f"step {step + 1:,}: the loss or its gradient is not finite; {good}; a lower ",
            Field("learning_rate"),
            " may help, ",
            Field("on_nan", "skip"),
            " drops such steps; the step's images, some of which may be at fault: ",
            ", ".join(map(str, np.asarray(order(np.arange(step, step + 1)))[0])),
        )

    dispatches = _dispatches(done, settings)
    if dispatches:
        on_writer(lambda: begin(training))
    compiled = {
        length: programs.advance.lower(state, batches(range(length))).compile()
        for length in {len(steps) for steps in dispatches}
    }
    any_process(False)  # compiled at last everywhere: see `cli.devices`
    tell, asked = progress or (lambda _: None), stop or (lambda: False)
    if dispatches:
        tell(Progress(done, settings.steps))
    log = MetricsLog(training.folder / METRICS, settings.steps, step=done, pending=pending)
    belongs = {"computed_by": training.computed_by, "run": training.description}
    checkpoints = training.folder / CHECKPOINTS
    with Saver(checkpoints, settings, mesh, checkpoint and done) as saver:
        for steps in dispatches:
            state, measured = compiled[len(steps)](state, batches(steps))
            log.add(steps, measured)
            done, line = steps.stop, None
            due = done == settings.steps or done % settings.checkpoint_every == 0
            # Several processes agree to stop where they wait anyway.
            together = log.is_due or due or jax.process_count() == 1
            if log.is_due:
                check(log.collect())
                line = log.write()
            tell(Progress(done, settings.steps, line))
            stopping = together and any_process(asked())
            if due or stopping:
                check(log.collect())
                saver.save(state, done, {"pending": log.pending, **belongs})
            if stopping:
                break
    variables = to_hosts(state.ema_params, mesh)
    average = run._replace(pretrained=run.pretrained._replace(variables=variables))
    return Fit(average, state, done, stopped=done < settings.steps)


def _dispatches(done: int, settings: Settings) -> list[range]:
    """The steps to go, cut also where checkpoints are due. The cuts are the same wherever a run
    resumes: a scan of another length may round otherwise."""
    cuts = {done, settings.steps}
    for every in (settings.dispatched(), settings.checkpoint_every):
        cuts.update(range((done // every + 1) * every, settings.steps, every))
    return [range(*pair) for pair in itertools.pairwise(sorted(cuts)) if done < settings.steps]
