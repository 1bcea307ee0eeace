"""Training on the disk: threads read batches ahead, devices scan over the steps of a dispatch, and
metrics, callbacks and checkpoints come between two dispatches."""

import hashlib
import math
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh

from jax_ddpm._errors import Field, FieldError, check_kind
from jax_ddpm._table import counted
from jax_ddpm.data import Dataset
from jax_ddpm.data.batches import Order, prefetched
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.interop.model import init_variables
from jax_ddpm.io.arrays import flatten, to_bytes
from jax_ddpm.io.checkpoint import Checkpoint, list_checkpoints, prune_checkpoints, save_checkpoint
from jax_ddpm.io.files import make_folder, write_json
from jax_ddpm.losses import check_loss
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.callbacks import (
    TRAINING_GIF,
    Every,
    best_line,
    open_callbacks,
    open_trackers,
    samples_on_the_way,
)
from jax_ddpm.runs.drawing import with_guidance
from jax_ddpm.runs.metrics import MetricsLog, Progress, keep_lines
from jax_ddpm.runs.model import (
    CHECKPOINTS,
    CONFIG,
    METRICS,
    PICTURES,
    PathLike,
    describe,
    load_model,
    matched,
)
from jax_ddpm.runs.programs import FitPrograms, fit_programs
from jax_ddpm.runs.resume import OVERWRITTEN, find, hold, on_host, read_state, shared
from jax_ddpm.runs.settings import CheckpointSettings, Settings, named_schedule
from jax_ddpm.training import TrainState, hosts
from jax_ddpm.training.sharding import device_mesh


class Fit(NamedTuple):
    """The end of a training.

    Attributes:
      run: the model, with the averaged weights, for `draw`.
      state: the last state; its `params` are the last weights.
      step: the number of steps taken.
      stopped: whether `stop` ended the training before its last step.
    """

    run: DiffusionModel
    state: TrainState
    step: int
    stopped: bool


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
    """Train a model on images, or resume its training, as `jax-ddpm train` does, without pictures.

    After a stop or a kill at any moment, the same call resumes, and ends with the same weights to
    the bit on the same devices. More `steps` continue a finished training. Warns of damaged
    checkpoints, which are set aside, of accepted changes and of other devices.

    Args:
      folder: the run, made if need be.
      data: the images, from `load_dataset`.
      settings: all options of the training. Default: `Settings()`.
      accept_changes: resume although settings or images have changed.
      overwrite: begin anew, in place of the run, if settings, steps or images have changed.
      progress: a callback, given a `Progress` before compiling, about every second, and at the
        end; `print` will do. It may read the newest checkpoint, once there is one, with
        `load_run(folder)`.
      stop: a callback without arguments, called after every dispatch. Once it returns True in any
        process, the training saves and ends (several processes: with the next line of metrics or
        checkpoint).

    Raises:
      FieldError: a setting or file is wrong, or a loss is not finite (unless `on_nan="skip"`).
      OSError: a file cannot be written. Earlier checkpoints are still there.

    Examples:
      >>> digits, losses = data.load_dataset("digits")[:4], {}
      >>> def log(now):
      ...     if now.line:
      ...         losses[now.line["step"]] = now.line["loss"]
      >>> settings = runs.Settings(model="simple", steps=2, batch_size=2, timesteps=10)
      >>> end = runs.fit("runs/mine", digits, settings, progress=log)
      >>> end.step, [*losses]
      (2, [2])
      >>> end = runs.fit("runs/mine", digits, settings)  # resumes: here there is nothing left to do
      >>> model = runs.load_run("runs/mine", checkpoint=2)
    """
    check_kind("data", data, Dataset, "load_dataset(path)")
    ways = {"accept_changes": accept_changes, "overwrite": overwrite}
    with open_run(folder, data, settings or Settings(), **ways) as training:
        return train(training, progress, stop)


class Training(NamedTuple):
    """A training that can begin, with the weights of `run`, or resume from `checkpoint`."""

    folder: Path
    settings: Settings
    data: Dataset
    run: DiffusionModel
    mesh: Mesh
    description: dict[str, Any]
    """Its config.json."""
    checkpoint: Checkpoint | None

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def computed_by(self) -> str:
        """What decides the last bits of a training, as far as it is known."""
        counts = {"processes": jax.process_count(), "fsdp": self.settings.fsdp}
        counts["steps a dispatch"] = self.settings.dispatched()
        layout = "".join(f", {count} {what}" for what, count in counts.items() if count > 1)
        kind = self.mesh.devices.flat[0].device_kind
        return f"{self.mesh.size} × {kind}{layout}, jax {jax.__version__}"

    def summary(self) -> str:
        """What is trained, on what, and from where: lines to read."""
        run, data, lines = self.run, self.data, list(self.data.notes)
        names = run.class_names or range(run.num_classes or 0)
        if unseen := [str(name) for k, name in enumerate(names) if k not in run.drawn]:
            lines.append(f"not learned, so not drawn by default: {', '.join(unseen[:20])}")
        classes = f" in {run.num_classes} classes" if run.num_classes else ""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables))
        devices = counted(self.mesh.size, f"{jax.default_backend()} device")
        if idle := jax.device_count() - self.mesh.size:
            devices += f" ({idle} more do not divide the batch)"
        images = f"{len(data.images):,} images of {'×'.join(map(str, data.image_shape))}{classes}"
        lines.append(f"{images}, {parameters:,} parameters, {devices} → {self.folder}")
        if self.step >= self.settings.steps:
            lines.append(f"trained to step {self.step:,} already")
        elif self.step:
            lines.append(f"resuming from step {self.step:,}")
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
        common = replace(settings, init=None, inception=None).record()  # without each host's paths
        weights = hashlib.sha256(to_bytes(flatten(jax.device_get(run.variables)))).hexdigest()
        here = description | {"train": common, "data": data.digest(), "weights": weights}
        if hosts.any_process(hosts.broadcast(here) != here):
            problem = "expected the same images, settings and model of init in every process"
            raise FieldError(None, problem)

    with ExitStack() as held:

        def look() -> Checkpoint | None:
            held.enter_context(hold(folder))
            return find(folder, description, settings, run.variables, accept_changes, overwrite)

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
        tell, asked = progress or (lambda _: None), stop or (lambda: False)
        state = _train(training, programs, order, state, tell, asked)
    average, step = run._replace(variables=hosts.gather(state.ema_params)), int(state.step)
    return Fit(average, state, step, stopped=step < settings.steps)


def _train(
    training: Training,
    programs: FitPrograms,
    order: Order,
    state: TrainState,
    tell: Callable[[Progress], None],
    stop: Callable[[], bool],
) -> TrainState:
    """Take the steps from `state` on, and save them on the way."""
    folder, settings, data, run, mesh, description, checkpoint = training
    step, saved, total, told = training.step, training.step, settings.steps, -math.inf
    pending = checkpoint.state["pending"] if checkpoint else {}
    dispatches, place = Dispatches(step, settings), programs.batch_sharding
    labels = None if run.num_classes is None else data.labels
    arrays = {"images": data.images, "extents": data.extents, "labels": labels}
    arrays = {name: array for name, array in arrays.items() if array is not None}
    time_to_log = Every(settings.logged(total), total)
    time_to_save = Every(settings.checkpoint_every, total)
    writing: Future[None] | None = None

    def wait() -> None:
        """Until what was saved is on the disk. Raises what kept it from being written."""
        hosts.run_on_writer(lambda: writing and writing.result())

    # What may be refused comes before anything of an earlier run is removed.
    callbacks = open_callbacks(folder, run, data, settings, mesh)
    with (
        open_trackers(settings.tracker, folder, description, step) as track,
        ThreadPoolExecutor(1) as thread,
        closing(prefetched(arrays, order, dispatches, place)) as ahead,
    ):
        tell(Progress(0, 0, what="compiling"))
        advance = {}
        for length in sorted(dispatches.lengths):
            batch = {}
            for name, array in arrays.items():
                shape = (length, order.batch_size, *array.shape[1:])
                batch[name] = jax.ShapeDtypeStruct(shape, array.dtype, sharding=place)
            advance[length] = programs.advance.lower(state, batch).compile()
        sync_global_devices("compiled")  # see `cli.common`
        measured = hosts.broadcast(hosts.run_on_writer(lambda: _make_room(training, pending))) or []
        log = MetricsLog(folder / METRICS, settings, run.schedule.num_timesteps, step, pending)
        for steps in dispatches:
            if time.monotonic() - told >= 1:
                told = time.monotonic()
                tell(Progress(log.done, total, log.line, "training"))
            began = time.perf_counter()
            batch = next(ahead)
            log.waited += time.perf_counter() - began
            state, metrics = advance[len(steps)](state, batch)
            log.add(steps, metrics)

            step, logs, saves = steps.stop, time_to_log(steps), time_to_save(steps)
            due = [callback for every, callback in callbacks if every(steps)]
            # Several processes agree to stop where they wait anyway.
            together = logs or saves or jax.process_count() == 1
            stopping = together and hosts.any_process(stop())
            if not (logs or saves or due or stopping):
                continue
            bad = log.collect()
            if bad is not None and settings.on_nan == "stop":
                wait()
                images = ", ".join(map(str, order(range(bad, bad + 1))[0]))
                good = f"the last good checkpoint is of step {saved:,}"
                good = good if saved else "no checkpoint was saved"
                problem = f"step {bad + 1:,}: the loss or its gradient is not finite; {good}; "
                rest = f" drops such steps; some of its images may be at fault: {images}"
                raise FieldError(None, problem, Field("on_nan", "skip"), rest)
            began, found = time.perf_counter(), {}
            for callback in due:
                found |= callback(step, state.ema_params)
            log.since += time.perf_counter() - began  # in which no steps were taken
            figures = {name: float(x) for name, x in found.items() if np.ndim(x) == 0}
            if logs or figures:
                line = log.write(figures)
                found |= line
                measured += [line] if figures else []
            if found:
                track(step, found)
            best = best_line(measured) if settings.keep_best else None
            best_step = best and best[0]["step"]
            if saves or stopping or best_step == step:
                wait()
                # Copies: the next step writes into the buffers of this one.
                trees, key = on_host(state, hosts.gather_to_writer)
                unwritten = {name: [*values] for name, values in log.pending.items()}
                known = {"key": key, "pending": unwritten}
                known |= {"computed_by": training.computed_by, "run": description}
                if hosts.is_writer():
                    what = folder / CHECKPOINTS, settings, step, trees, known, best_step
                    writing = thread.submit(save, *what)
                saved = step
            if stopping:
                break
        tell(Progress(step, total, log.line, "training"))
        wait()
    return state


def _make_room(training: Training, pending: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Leave nothing of another run or of later steps. The lines of metrics with a checkpoint."""
    folder, done = training.folder, training.step
    if not done:
        # Renamed first: half-removed checkpoints would look damaged.
        (folder / CHECKPOINTS).rename(folder / OVERWRITTEN)
        make_folder(folder / CHECKPOINTS)
        shutil.rmtree(folder / OVERWRITTEN, ignore_errors=True)
    write_json(folder / CONFIG, training.description)
    later = [path for path in samples_on_the_way(folder) if int(path.stem) > done]
    for path in (*later, *(folder / name for name in (TRAINING_GIF, *PICTURES))):
        path.unlink(missing_ok=True)
    lines = keep_lines(folder / METRICS, done - len(pending.get("loss", ())))
    kept = {int(path.name) for path in list_checkpoints(folder / CHECKPOINTS)}
    return [line for line in lines if line["step"] in kept]


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


def save(
    folder: Path, settings: CheckpointSettings, step: int, arrays: Any, state: Any, best: int | None
) -> None:
    """Write the checkpoint of `step`, and remove those that are not kept; `best` is one to keep."""
    try:
        save_checkpoint(folder, step, arrays, state)
    except ValueError as error:
        raise FieldError(None, f"step {step:,} is not saved: {error}") from None
    prune_checkpoints(folder, keep=settings.keep, keep_every=settings.keep_every, also=(best,))


def new_run(settings: Settings, data: Dataset) -> DiffusionModel:
    """The model that `settings` ask for, for these images, not yet trained on them."""
    if (settings.batch_size or 1) > len(data.images):
        most = counted(len(data.images), "image")
        problem = f"expected at most {most}, got {settings.batch_size}"
        raise FieldError("batch_size", problem)
    if settings.init is not None:
        run = _trained(settings, settings.init, data)
    else:
        run = untrained(settings, data.image_shape, data.num_classes)
        key = seed_key(settings.seed)
        run = run._replace(variables=init_variables(run.model, key, data.image_shape))
    check_loss(settings.loss_type, settings.weighting, run.variance_type)
    run = run._replace(preparation=data.preparation.record())
    if run.num_classes is not None:
        learned = np.unique(np.asarray(data.labels)).tolist() if settings.label_dropout < 1 else ()
        names = data.class_names or run.class_names
        run = run._replace(class_names=names, learned=tuple(learned))
    return with_guidance(run, settings.guidance)


def untrained(
    settings: Settings, image_shape: tuple[int, int, int], num_classes: int | None
) -> DiffusionModel:
    """A new model, as `settings` ask for; its weights are shapes."""
    classes = num_classes if settings.model == "unet" else None
    null_label = classes if settings.label_dropout else None
    model = _new_model(settings, image_shape, classes and classes + (null_label is not None))
    try:
        variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except ValueError as error:
        size = "×".join(map(str, image_shape))
        problem = f"the network refuses images of {size}: {error}"
        if settings.unet and getattr(error, "field", None) in settings.unet:
            problem = str(error)  # whatever the images
        raise FieldError("unet" if settings.unet else "data", problem) from None
    return DiffusionModel(
        model,
        variables,
        named_schedule(settings.schedule, settings.timesteps),
        image_shape,
        prediction_type=settings.prediction_type,
        variance_type=settings.variance_type,
        timestep_spacing="trailing",
        num_classes=classes,
        null_label=null_label,
        guidance=1.0 if null_label is None or settings.label_dropout == 1 else 2.0,
    )


def _new_model(settings: Settings, image_shape: tuple[int, ...], num_labels: int | None) -> Any:
    height, width, channels = image_shape
    learned = settings.variance_type.startswith("learned")
    if settings.model == "simple":
        if learned:
            raise FieldError("variance_type", "a learned one comes with ", Field("model", "unet"))
        return SimpleUNet(channels=channels)
    # A level more for every doubling from 32 pixels on, up to four; attention at the lowest.
    levels = 2
    for side in (32, 64):
        levels += min(height, width) >= side and not (height % (side // 8) or width % (side // 8))
    given: Any = (settings.unet or {}).items()
    given = {name: tuple(x) if isinstance(x, list) else x for name, x in given}
    widths = given.get("block_out_channels", (32, *(64,) * (levels - 1)))
    plain = np.size(widths) - 1
    small: dict[str, Any] = {
        "block_out_channels": widths,
        "down_block_types": (*("DownBlock2D",) * plain, "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", *("UpBlock2D",) * plain),
        "sample_size": (height, width),
        "in_channels": channels,
        "out_channels": channels * (1 + learned),
        "num_class_embeds": num_labels,
    }
    return ddpm_digits(**small | given)


def _trained(settings: Settings, init: Path, data: Dataset) -> DiffusionModel:
    """The model in `init`; its label k now is class k of the images."""
    try:
        run = load_model(init)
    except FieldError as error:
        raise FieldError("init", *error.problem) from None
    # Sixteen bits hold a network, but not the small steps that train it.
    run = run._replace(variables=jax.tree.map(lambda x: np.asarray(x, "float32"), run.variables))
    if run.image_shape != data.image_shape:
        raise FieldError("init", f"expected images of {run.image_shape}, got {data.image_shape}")
    if run.num_classes is None:
        if data.labels is not None:
            warnings.warn("labels are left out: the network of init has no classes", stacklevel=2)
        return run
    if data.num_classes is None:
        raise FieldError("init", f"its network has {run.num_classes} classes, the images none")

    # The network has a row for each label: which one is that of each class of the images?
    classes, null, names = [*range(data.num_classes)], run.null_label, run.class_names
    labels = [k for k in range(run.num_classes) if k != null or k in classes]
    shown = replace(data, labels=np.asarray(classes))  # a class without an image has its row, too
    row_of = {k: row for row, k in matched(names, labels, shown).items()}
    rows = [row_of.get(k) for k in classes]  # None: the class is new
    # The label of no class goes where a class of the images has its row, or no label is dropped.
    null_rows = [null] if null is not None and settings.label_dropout and null not in rows else []
    if not null_rows and settings.label_dropout not in (Settings.label_dropout, 0):
        raise FieldError("label_dropout", "the network has no label that stands for no class")
    network: Any = run.model
    chosen, place = rows + null_rows, len(rows)
    if null_rows and rows == classes and not (names and data.class_names):  # a larger table stays
        chosen, place = [*range(network.num_class_embeds)], null
    network = network.clone(num_class_embeds=len(chosen))
    own = new = run.variables["params"]["class_embedding"]["embedding"]
    if None in rows:
        fresh = init_variables(network, seed_key(settings.seed), data.image_shape)
        new = fresh["params"]["class_embedding"]["embedding"]
    table = [new[k] if row is None else own[row] for k, row in enumerate(chosen)]
    params = {**run.variables["params"], "class_embedding": {"embedding": np.stack(table)}}
    return run._replace(
        model=network,
        variables={"params": params},
        num_classes=len(rows),
        null_label=place if null_rows else None,
        guidance=2.0 if null_rows and settings.label_dropout < 1 else 1.0,
        class_names=names[: len(rows)] if names and rows == classes else None,
    )


def computing(run: DiffusionModel, *, dtype: str, remat: bool) -> DiffusionModel:
    """The run, its network with this dtype and rematerialisation."""
    if remat and not isinstance(run.model, UNet):
        raise FieldError("remat", "the tutorial's network has no blocks to recompute")
    changes: dict[str, Any] = {"remat": True} if remat else {}
    if dtype != "float32":
        changes["dtype"] = jnp.dtype(dtype)
    return run._replace(model=run.model.clone(**changes))
