"""Training on the disk: batches in, steps, lines of metrics and checkpoints out.

threads: indices of k steps ─▶ each process reads its rows, ahead of the devices
devices: lax.scan over k training steps, the state donated
host:    metrics, callbacks and checkpoints between two dispatches
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from jax_ddpm._errors import Field, FieldError, check_kind
from jax_ddpm.data import Dataset
from jax_ddpm.data.batches import Order, prefetched
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import flatten, to_bytes
from jax_ddpm.io.checkpoint import Checkpoint, list_checkpoints, prune_checkpoints, save_checkpoint
from jax_ddpm.io.files import make_folder, write_json
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.callbacks import (
    TRAINING_GIF,
    Every,
    best_line,
    open_callbacks,
    open_trackers,
    samples_on_the_way,
)
from jax_ddpm.runs.initial import computing, new_run
from jax_ddpm.runs.metrics import MetricsLog, Progress
from jax_ddpm.runs.model import CHECKPOINTS, CONFIG, METRICS, PICTURES, PathLike, describe
from jax_ddpm.runs.programs import FitPrograms, fit_programs
from jax_ddpm.runs.resume import OVERWRITTEN, find, hold, on_host, read_state, shared
from jax_ddpm.runs.settings import CheckpointSettings, Settings
from jax_ddpm.training import TrainState, hosts
from jax_ddpm.training.sharding import device_mesh


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
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fit:
    """Train a model on images, in a folder that can be resumed: `jax-ddpm train` without pictures.

    Called again with the same arguments, after it was stopped or killed at any moment, it resumes
    and ends with the same weights to the bit (on the same devices); with more `steps`, it trains
    longer. It warns of damaged checkpoints, which are set aside, of accepted changes and of other
    devices.

    Args:
      folder: of the run; made if need be.
      data: the images, as `load_dataset` reads them.
      settings: everything else. Default: `Settings()`.
      accept_changes: resume although settings or images are no longer those it began with.
      overwrite: instead, begin anew in its place where those, or the steps, are others; not
        together with `accept_changes`.
      progress: called when programs are compiled, before the first step, about every second and
        at the end; `print` will do.
      stop: asked after every dispatch; once it is true in any process, the training saves and
        ends there (several processes: at the next line of metrics or checkpoint).

    Raises:
      FieldError: naming the setting, or the file, that is wrong; where a loss or gradient is not
        finite (unless `on_nan="skip"`).
      OSError: something cannot be written. What was saved before is still there.
    """
    check_kind("data", data, Dataset, "load_dataset(path)")
    ways = {"accept_changes": accept_changes, "overwrite": overwrite}
    with open_run(folder, data, settings or Settings(), **ways) as training:
        return train(training, progress, stop)


class Training(NamedTuple):
    """A training that can begin or resume."""

    folder: Path
    settings: Settings
    data: Dataset
    run: DiffusionModel
    """The model before the first step."""
    mesh: Mesh
    description: dict[str, Any]
    """Its config.json."""
    checkpoint: Checkpoint | None
    """From which it resumes."""

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def computed_by(self) -> str:
        """What decides the last bits of a training, as far as it is known."""
        counts = (jax.process_count(), self.settings.fsdp, self.settings.dispatched())
        named = zip(counts, ("processes", "fsdp", "steps a dispatch"), strict=True)
        layout = "".join(f", {count} {what}" for count, what in named if count > 1)
        kind = self.mesh.devices.flat[0].device_kind
        return f"{self.mesh.size} × {kind}{layout}, jax {jax.__version__}"

    def summary(self) -> str:
        """What is trained, on what, and from where: lines to read."""
        run, data, lines = self.run, self.data, list(self.data.notes)
        names = run.class_names or range(run.num_classes or 0)
        if unseen := [str(name) for k, name in enumerate(names) if k not in run.drawn]:
            lines.append(f"not learned, so not drawn by default: {', '.join(unseen[:20])}")
        images = f"{len(data.images):,} images of {'×'.join(map(str, data.image_shape))}"
        images += f" in {run.num_classes} classes" if run.num_classes else ""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables))
        devices = f"{self.mesh.size} {jax.default_backend()} device(s)"
        if idle := jax.device_count() - self.mesh.size:
            devices += f" ({idle} more do not divide the batch)"
        lines.append(f"{images}, {parameters:,} parameters, {devices} → {self.folder}")
        if self.step:
            ended = self.step >= self.settings.steps
            where = "trained to step {:,} already" if ended else "resuming from step {:,}"
            lines.append(where.format(self.step))
        return "\n".join(lines)


@contextmanager
def open_run(
    folder: PathLike,
    data: Dataset,
    settings: Settings,
    *,
    accept_changes: bool = False,
    overwrite: bool = False,
) -> Iterator[Training]:
    """Hold a run's folder for this process alone, and find where its training begins or resumes.

    Arguments and errors are those of `fit`.
    """
    folder = Path(folder)
    if accept_changes and overwrite:
        ways = Field("accept_changes", True), " and ", Field("overwrite", True)
        raise FieldError(None, "expected one of ", *ways, ", got both")

    def prepare() -> tuple[Settings, DiffusionModel, Mesh]:
        data.check()
        batch, every = settings.batched(len(data.images)), settings.logged(settings.steps)
        whole = replace(settings, batch_size=batch, log_every=every)
        run = new_run(whole, data)
        computing(run, dtype=whole.dtype, remat=whole.remat)  # refuses what does not go together
        # All devices that share a part of the batch evenly.
        return whole, run, device_mesh(batch // whole.accumulate, fsdp=whole.fsdp)

    settings, run, mesh = hosts.run_on_all(prepare)
    description = describe(run, settings.record(), data.describe())
    if jax.process_count() > 1:
        weights = hashlib.sha256(to_bytes(flatten(jax.device_get(run.variables)))).hexdigest()
        common = replace(settings, init=None, inception=None).record()  # without each host's paths
        here = json.dumps([describe(run, common, data.digest()), weights])
        if hosts.any_process(hosts.broadcast(here) != here):
            problem = "expected the same images, settings and model of init in every process"
            raise FieldError(None, problem)

    with ExitStack() as held:

        def look() -> Checkpoint | None:
            held.enter_context(hold(folder))
            options = {"accept": accept_changes, "over": overwrite}
            return find(folder, description, settings, run.variables, **options)

        checkpoint = shared(hosts.run_on_writer(look))
        training = Training(folder, settings, data, run, mesh, description, checkpoint)
        before, now = checkpoint and checkpoint.state["computed_by"], training.computed_by
        if hosts.is_writer() and 0 < training.step < settings.steps and before != now:
            note = f"step {training.step:,} was trained by {before}, now it is {now}"
            warnings.warn(f"{note}: the same within rounding, not to the bit", stacklevel=4)
        yield training


def train(
    training: Training,
    progress: Callable[[Progress], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fit:
    """Train what `open_run` opened, to its end or until `stop` is true, and save it."""
    _, settings, data, run, mesh, _, checkpoint = training
    data_key, train_key = jax.random.split(jax.random.fold_in(seed_key(settings.seed), 0))
    computed = computing(run, dtype=settings.dtype, remat=settings.remat)
    programs = fit_programs(computed, settings, mesh, train_key)
    if checkpoint is None:
        state = programs.init(jax.device_get(run.variables))
    else:
        state = programs.to_devices(read_state(checkpoint, programs.state))
    if training.step < settings.steps:
        order = Order(data_key, len(data), settings.batched())
        state = _train(training, programs, order, state, progress or (lambda _: None), stop)
    average, step = run._replace(variables=hosts.gather(state.ema_params)), int(state.step)
    return Fit(average, state, step, stopped=step < settings.steps)


def _train(
    training: Training,
    programs: FitPrograms,
    order: Order,
    state: TrainState,
    tell: Callable[[Progress], None],
    stop: Callable[[], bool] | None,
) -> TrainState:
    """Take the steps from `state` on, and save them on the way."""
    folder, settings, data, run, mesh, description, checkpoint = training
    done, saved, total = training.step, training.step, settings.steps
    pending = checkpoint.state["pending"] if checkpoint else {}
    dispatches = Dispatches(done, settings)
    labels = None if run.num_classes is None else data.labels
    arrays = {"images": data.images, "extents": data.extents, "labels": labels}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    time_to_log = Every(settings.logged(total), total)
    time_to_save = Every(settings.checkpoint_every, total)

    def settle() -> None:
        """Wait for the steps so far, and end the training if one was not finite."""
        bad = log.collect()
        if bad is not None and settings.on_nan == "stop":
            saver.wait()
            raise _not_finite(bad, order(range(bad, bad + 1))[0], saved)

    # What may be refused comes before anything of an earlier run is removed.
    callbacks = open_callbacks(folder, run, data, settings, mesh)
    with (
        open_trackers(settings.tracker, folder, description, done) as track,
        closing(Saver(folder / CHECKPOINTS, settings)) as saver,
        closing(prefetched(arrays, order, dispatches, programs.batch_sharding)) as ahead,
    ):
        tell(Progress(0, 0, what="compiling"))
        advance = {}
        for length in sorted(dispatches.lengths):
            batch = {}
            for name, array in arrays.items():
                shape, place = (length, order.batch_size, *array.shape[1:]), programs.batch_sharding
                batch[name] = jax.ShapeDtypeStruct(shape, array.dtype, sharding=place)
            advance[length] = programs.advance.lower(state, batch).compile()
        sync_global_devices("compiled")  # see `cli.common`
        hosts.run_on_writer(lambda: _make_room(folder, description, done))
        log = MetricsLog(
            folder / METRICS, settings, run.schedule.num_timesteps, done, pending, tell
        )
        kept = {int(path.name) for path in list_checkpoints(folder / CHECKPOINTS)}
        measured = hosts.broadcast([line for line in log.lines if line["step"] in kept])
        best = _best_step(settings, measured)
        log.report(now=True)
        for steps in dispatches:
            with log.spent("waiting"):
                batch = next(ahead)
            state, metrics = advance[len(steps)](state, batch)
            done = steps.stop
            log.add(steps, metrics)

            logs, saves = time_to_log(steps), time_to_save(steps)
            due = [callback for every, callback in callbacks if every(steps)]
            if logs or saves or due:
                settle()

            found = {}
            with log.spent("callbacks"):
                for callback in due:
                    found |= callback(done, state.ema_params)
            figures = {name: float(x) for name, x in found.items() if np.ndim(x) == 0}
            if logs or figures:
                line = log.write(figures)
                found |= line
                if figures:
                    measured.append(line)
                    best = _best_step(settings, measured)
            if found:
                track(done, found)
            log.report(now=done == total)

            # Several processes agree to stop where they wait anyway.
            together = logs or saves or jax.process_count() == 1
            stopping = together and hosts.any_process(stop is not None and stop())
            if saves or stopping or best == done:
                settle()
                belongs = {"computed_by": training.computed_by, "run": description}
                saver.save(state, done, {"pending": log.pending, **belongs}, best)
                saved = done
            if stopping:
                break
        saver.wait()
    return state


def _best_step(settings: Settings, lines: Sequence[dict[str, Any]]) -> int | None:
    """The step of the best line, if its checkpoint is to be kept."""
    best = best_line(lines) if settings.keep_best else None
    return best and best[0]["step"]


def _not_finite(step: int, images: np.ndarray, saved: int) -> FieldError:
    good = f"the last good checkpoint is of step {saved:,}" if saved else "no checkpoint was saved"
    problem = f"step {step + 1:,}: the loss or its gradient is not finite; {good}; "
    rest = f" drops such steps; some of its images may be at fault: {', '.join(map(str, images))}"
    return FieldError(None, problem, Field("on_nan", "skip"), rest)


def _make_room(folder: Path, description: dict[str, Any], done: int) -> None:
    """Make the folder this training's: nothing of another run, or of later steps, is left."""
    if not done:
        # Renamed first: half-removed checkpoints would look damaged.
        (folder / CHECKPOINTS).rename(folder / OVERWRITTEN)
        make_folder(folder / CHECKPOINTS)
        shutil.rmtree(folder / OVERWRITTEN, ignore_errors=True)
    write_json(folder / CONFIG, description)
    later = [path for path in samples_on_the_way(folder) if int(path.stem) > done]
    for path in (*later, *(folder / name for name in (TRAINING_GIF, *PICTURES))):
        path.unlink(missing_ok=True)


class Dispatches(Sequence[range]):
    """The steps after `done`, a range for each dispatch, made when it is asked for. Each stretch
    from one checkpoint to the next is cut from its start, so at the same steps wherever a run
    resumes: a scan of another length may round otherwise."""

    def __init__(self, done: int, settings: Settings) -> None:
        self._every, self._size = settings.checkpoint_every, settings.dispatched()
        self._pieces = -(-self._every // self._size)  # of a stretch
        self._steps = range(done, settings.steps)
        stretch, rest = divmod(done, self._every)
        self._first = stretch * self._pieces + rest // self._size

    def _cut(self, number: int) -> int:
        stretch, piece = divmod(number, self._pieces)
        return stretch * self._every + piece * self._size

    def __len__(self) -> int:
        stretch, rest = divmod(self._steps.stop, self._every)
        number = stretch * self._pieces + -(-rest // self._size)
        return number - self._first if self._steps else 0

    def __getitem__(self, index: Any) -> Any:
        number = range(self._first, self._first + len(self))[index]
        start, stop = max(self._cut(number), self._steps.start), self._cut(number + 1)
        return range(start, min(stop, self._steps.stop))

    @property
    def lengths(self) -> set[int]:
        """Of them all; they repeat from one stretch to the next."""
        return {len(each) for each in (*islice(self, 2 * self._pieces), self[-1])}


class Saver:
    """Saves one checkpoint at a time, in a thread. `close` it after the last."""

    def __init__(self, folder: Path, settings: CheckpointSettings) -> None:
        self._folder, self._settings = folder, settings
        self._threads = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(
        self, state: TrainState, step: int, extra: Mapping[str, Any], best: int | None = None
    ) -> None:
        """Save the state after `step` steps, and what belongs to it; `best` is a step to keep."""
        self.wait()
        # Copies: the next step writes into the buffers of this one.
        arrays, key = on_host(state, hosts.gather_to_writer)

        def write() -> None:
            try:
                save_checkpoint(self._folder, step, arrays, {"key": key, **extra})
            except ValueError as error:
                raise FieldError(None, f"step {step:,} is not saved: {error}") from None
            keep, every = self._settings.keep, self._settings.keep_every
            prune_checkpoints(self._folder, keep=keep, keep_every=every, also=(best,))

        if hosts.is_writer():
            self._writing = self._threads.submit(write)

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises what kept it from being written."""
        hosts.run_on_writer(lambda: self._writing and self._writing.result())

    def close(self) -> None:
        self._threads.shutdown()
