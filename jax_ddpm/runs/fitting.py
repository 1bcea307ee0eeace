"""Training on the disk: batches in, steps, lines of metrics and checkpoints out.

threads: indices of k steps ─▶ each process reads its rows, ahead of the devices
devices: lax.scan over k training steps, the state donated
host:    metrics, samples and checkpoints between two dispatches
"""

import itertools
import warnings
from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import jax
from jax.experimental.multihost_utils import sync_global_devices

from jax_ddpm._errors import Field, FieldError, check_kind
from jax_ddpm.data import Dataset
from jax_ddpm.data.batches import Order, prefetched
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.checkpoint import list_checkpoints
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.metrics import MetricsLog
from jax_ddpm.runs.model import CHECKPOINTS, METRICS, PathLike
from jax_ddpm.runs.previews import Previews
from jax_ddpm.runs.programs import fit_programs, learning_rate
from jax_ddpm.runs.progress import Progress
from jax_ddpm.runs.resuming import Training, begin, open_run
from jax_ddpm.runs.saving import Saver, read_state
from jax_ddpm.runs.settings import Settings
from jax_ddpm.runs.starting import computing
from jax_ddpm.runs.trackers import open_trackers
from jax_ddpm.runs.watching import Watch
from jax_ddpm.training import TrainState
from jax_ddpm.training.hosts import any_process, broadcast, gather, run_on_writer


class Fit(NamedTuple):
    """Where a training ended."""

    run: DiffusionModel
    """The model, with the average of the weights."""
    state: TrainState
    step: int
    stopped: bool
    """Whether it was asked to stop before its last step."""


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
    settings = settings or Settings()
    check_kind("data", data, Dataset, "load_dataset(path)")
    check_kind("settings", settings, Settings, "Settings(steps=1000)")
    with open_run(folder, data, settings, accept_changes=accept_changes) as training:
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
    key = jax.random.fold_in(seed_key(settings.seed), 0)
    data_key, train_key = jax.random.split(key)
    computed = computing(run, dtype=settings.dtype, remat=settings.remat)
    programs = fit_programs(computed, settings, mesh, train_key)
    checkpoint, done = training.checkpoint, training.step
    if checkpoint is None:
        state, pending = programs.init(jax.device_get(run.variables)), {}
    else:
        pending = checkpoint.state["pending"]
        try:
            state = programs.to_devices(read_state(checkpoint, programs.state))
        except ValueError as error:
            problem = f"the checkpoint of step {done:,} is of another network ({error}); another "
            rest = Field("folder"), " begins another run"
            raise FieldError("accept_changes", problem, *rest) from None

    size = settings.batched()
    order = Order(data_key, len(data.images), size)
    labels = None if run.num_classes is None else data.labels
    arrays = {"images": data.images, "labels": labels, "extents": data.extents}
    arrays = {name: array for name, array in arrays.items() if array is not None}

    def shapes(steps: int) -> dict[str, jax.ShapeDtypeStruct]:
        def batch(array: Any) -> jax.ShapeDtypeStruct:
            shape = (steps, size, *array.shape[1:])
            return jax.ShapeDtypeStruct(shape, array.dtype, sharding=programs.batch_sharding)

        return {name: batch(array) for name, array in arrays.items()}

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
            ", ".join(map(str, order(range(step, step + 1))[0])),
        )

    dispatches = _dispatches(done, settings)
    if dispatches:
        run_on_writer(lambda: begin(training))
    tell, asked = progress or (lambda _: None), stop or (lambda: False)
    belongs = {"computed_by": training.computed_by, "run": training.description}
    checkpoints = training.folder / CHECKPOINTS
    trackers = settings.tracker if dispatches else ()
    with (
        open_trackers(trackers, training.folder, training.description, done) as tracker,
        Saver(checkpoints, settings, checkpoint and done) as saver,
        closing(prefetched(arrays, order, dispatches, programs.batch_sharding)) as ahead,
    ):
        compiled = {
            length: programs.advance.lower(state, shapes(length)).compile()
            for length in {len(steps) for steps in dispatches}
        }
        sync_global_devices("compiled")  # see `cli.devices`
        if dispatches:
            tell(Progress(done, settings.steps))
        previews = Previews(training.folder, run, settings, mesh, done) if dispatches else None
        log = MetricsLog(
            training.folder / METRICS,
            settings.steps,
            batch_size=size,
            num_timesteps=run.schedule.num_timesteps,
            learning_rate=learning_rate(settings),
            step=done,
            pending=pending,
        )
        with log.paused():
            here = {int(path.name) for path in list_checkpoints(checkpoints)}
            lines = [line for line in log.lines if line["step"] in here or not settings.keep_best]
            watch = Watch(run, data, settings, mesh, done, broadcast(lines))
        for steps in dispatches:
            with log.waiting():
                batch = next(ahead)
            state, measured = compiled[len(steps)](state, batch)
            log.add(steps, measured)
            done, line = steps.stop, None
            due = done == settings.steps or done % settings.checkpoint_every == 0
            # Several processes agree to stop where they wait anyway.
            together = log.is_due or due or jax.process_count() == 1
            if log.is_due:
                check(log.collect())
                figures = {}
                if watch.due(done):
                    with log.paused():
                        figures = watch.measure(done, state.ema_params)
                    due = due or (settings.keep_best and watch.best == done)
                line = log.write(figures)
                tracker.log(line)
            if previews and previews.due(done):
                check(log.collect())
                with log.paused():
                    if (picture := previews.draw(done, state.ema_params)) is not None:
                        tracker.picture(done, "samples", picture)
            tell(Progress(done, settings.steps, line))
            stopping = together and any_process(asked())
            if due or stopping:
                check(log.collect())
                saver.save(state, done, {"pending": log.pending, **belongs}, watch.best)
            if stopping:
                break
        if previews and done == settings.steps:
            previews.finish()
    average = run._replace(variables=gather(state.ema_params))
    return Fit(average, state, done, stopped=done < settings.steps)


def _dispatches(done: int, settings: Settings) -> list[range]:
    """The steps to go, cut also where checkpoints are due. The cuts are the same wherever a run
    resumes: a scan of another length may round otherwise."""
    cuts = {done, settings.steps}
    for every in (settings.dispatched(), settings.checkpoint_every):
        cuts.update(range((done // every + 1) * every, settings.steps, every))
    return [range(*pair) for pair in itertools.pairwise(sorted(cuts)) if done < settings.steps]
