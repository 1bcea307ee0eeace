"""Training again in the same folder resumes: what changed, what is damaged, from where.

nothing there        begin
config.json alone    begin again, as the settings are now: no checkpoint was reached
checkpoints/         resume from the newest that is intact; what is damaged is set aside
"""

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from optax.tree_utils import tree_set

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data import Dataset
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import flatten, from_bytes, to_bytes
from jax_ddpm.io.checkpoint import (
    Checkpoint,
    Damaged,
    list_checkpoints,
    load_checkpoint,
    set_aside,
)
from jax_ddpm.io.files import make_folder, read_json, write_json
from jax_ddpm.runs.model import CHECKPOINTS, CONFIG, PICTURES, PathLike, describe
from jax_ddpm.runs.programs import optimizer
from jax_ddpm.runs.settings import CheckpointSettings, Settings
from jax_ddpm.runs.starting import computing, new_run
from jax_ddpm.training.hosts import any_process, broadcast, run_on_all, run_on_writer
from jax_ddpm.training.sharding import device_mesh

# How a run is laid out and guarded: its weights do not depend on these.
_FREE = {*CheckpointSettings.__dataclass_fields__, "fsdp", "steps_per_dispatch", "on_nan"}
_FREE |= {"skip_unreadable", "max_pixels", "range"}  # which show in the images
# What else the weights of `init` depend on.
_FROM_INIT = ("model", "scheduler", "image_shape", "num_classes", "null_label")


class Change(NamedTuple):
    """A setting that is not what the run began with."""

    field: str
    what: str


class Training(NamedTuple):
    """A training that can begin or resume: what `open_run` found and `train` needs."""

    folder: Path
    settings: Settings
    data: Dataset
    run: DiffusionModel
    """The model before the first step."""
    mesh: Mesh
    description: dict[str, Any]
    """Its config.json."""
    checkpoint: Checkpoint | None
    """Where it resumes, or None where it begins."""
    changes: tuple[Change, ...]
    """What was accepted."""
    damaged: dict[Path, str]
    """Checkpoints that were set aside, under their new names, and what is wrong with each."""

    @property
    def step(self) -> int:
        """How many steps were taken."""
        return 0 if self.checkpoint is None else self.checkpoint.step

    @property
    def computed_by(self) -> str:
        """What decides the last bits of a training, as far as it is known."""
        details = {
            "processes": jax.process_count(),
            "fsdp": self.settings.fsdp,
            "steps a dispatch": self.settings.dispatched(),
        }
        layout = "".join(f", {count} {what}" for what, count in details.items() if count > 1)
        kind = self.mesh.devices.flat[0].device_kind
        return f"{self.mesh.size} × {kind}{layout}, jax {jax.__version__}"

    def notes(self) -> list[str]:
        """What a user should know of where it resumes: damaged checkpoints, other devices."""
        lines = [f"{problem}; set aside as {path.name}" for path, problem in self.damaged.items()]
        if self.checkpoint is not None and self.step < self.settings.steps:
            before, now = self.checkpoint.state["computed_by"], self.computed_by
            if before != now:
                lines.append(
                    f"step {self.step:,} was trained by {before}, now it is {now}: the same within "
                    "rounding, not to the bit"
                )
        return lines

    def summary(self) -> str:
        """What is trained, on what, and from where: lines to read."""
        count, image_shape = len(self.data.images), self.data.image_shape
        classes = f" in {self.run.num_classes} classes" if self.run.num_classes else ""
        parameters = sum(leaf.size for leaf in jax.tree.leaves(self.run.variables))
        names = self.run.class_names or range(self.run.num_classes or 0)
        unseen = [str(name) for k, name in enumerate(names) if k not in self.run.drawn]
        idle = jax.device_count() - self.mesh.size
        left_out = f" ({idle} more do not divide the batch)" if idle else ""
        lines = [
            *self.notes(),
            *self.data.notes,
            *[f"not learned, so not drawn by default: {', '.join(unseen[:20])}"] * bool(unseen),
            f"{count:,} images of {'×'.join(map(str, image_shape))}{classes}, {parameters:,} "
            f"parameters, {self.mesh.size} {jax.default_backend()} device(s){left_out} → "
            f"{self.folder}",
        ]
        if self.checkpoint is not None:
            ended = self.step >= self.settings.steps
            where = f"step {self.step:,}"
            lines.append(f"trained to {where} already" if ended else f"resuming from {where}")
        return "\n".join(lines)


@contextmanager
def open_run(
    folder: PathLike, data: Dataset, settings: Settings, *, accept_changes: bool = False
) -> Iterator[Training]:
    """Hold a run's folder for this process alone, and find where its training begins or resumes.

    Raises `FieldError` where settings and images do not suit one another, if another process
    holds the folder or something else is in it, if the run began with other settings or images
    (and `accept_changes` is not set), or if none of its checkpoints is intact; and `OSError`.
    """
    folder = Path(folder)
    settings, run, mesh = run_on_all(lambda: _prepare(settings, data))
    described = data.describe()
    _agree(settings, run, described)
    description = describe(run, settings.record(), described)

    with ExitStack() as held:
        run_on_writer(lambda: held.enter_context(_locked(folder)))
        found = run_on_writer(lambda: _find(folder, description, accept_changes))
        checkpoint, changes, damaged = found or (None, (), {})
        checkpoint = _broadcast(checkpoint)
        if checkpoint is not None:
            checkpoint = _with_optimizer(checkpoint, settings)
        yield Training(folder, settings, data, run, mesh, description, checkpoint, changes, damaged)


def begin(training: Training) -> None:
    """From here on the folder is of this training: there are no pictures of it yet."""
    write_json(training.folder / CONFIG, training.description)
    make_folder(training.folder / CHECKPOINTS)
    for name in PICTURES:
        (training.folder / name).unlink(missing_ok=True)


def _prepare(settings: Settings, data: Dataset) -> tuple[Settings, DiffusionModel, Mesh]:
    data.check()
    settings = replace(settings, batch_size=settings.batched(len(data.images)))
    run = new_run(settings, data)
    computing(run, dtype=settings.dtype, remat=settings.remat)  # refuses what does not go together
    # All devices that share a part of the batch evenly.
    batch = settings.batched() // settings.accumulate
    return settings, run, device_mesh(batch, fsdp=settings.fsdp)


def _agree(settings: Settings, run: DiffusionModel, data: dict[str, Any]) -> None:
    """Raises `FieldError` where processes have different settings, images or models."""
    if jax.process_count() == 1:
        return
    weights = to_bytes(flatten(jax.device_get(run.variables)))
    for field, what, here in (
        ("data", "images", {**data, "source": None}),
        (None, "settings", repr(replace(settings, init=None, inception=None))),
        ("init", "model", [describe(run), hashlib.sha256(weights).hexdigest()]),
    ):
        here = json.dumps(here)
        if any_process(broadcast(here) != here):
            raise FieldError(field, f"expected the same {what} in every process")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make the run's folder, and hold it for this process alone until it ends, however it ends."""
    if folder.is_dir() and not any((folder / name).exists() for name in (CONFIG, CHECKPOINTS)):
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            raise FieldError("folder", f"{folder} exists already, and is no run: choose another")
    make_folder(folder)
    with (folder / ".lock").open("a") as lock:
        for leftover in folder.glob(".pictures*"):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"{folder} is being trained by another process: wait for its end, or choose"
            raise FieldError("folder", f"{problem} another name") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


def _with_optimizer(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """The checkpoint; if the settings' optimizer is another than its own, with theirs before a
    first step, but for the rate, whose schedule goes on. That is warned of."""
    params, init = checkpoint.arrays["params"], optimizer(settings).init
    if flatten(jax.eval_shape(init, params)).keys() == checkpoint.arrays["optimizer"].keys():
        return checkpoint
    warnings.warn("the optimizer is another: the weights stay, and it starts anew", stacklevel=5)
    rate, step = "ScaleByScheduleState", np.int32(checkpoint.step)
    state = tree_set(init(params), lambda path, _: path[-1].tuple_name == rate, count=step)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
    return checkpoint._replace(arrays=checkpoint.arrays | {"optimizer": arrays})


def _find(
    folder: Path, description: dict[str, Any], accept_changes: bool
) -> tuple[Checkpoint | None, tuple[Change, ...], dict[Path, str]]:
    """Where to resume, the changes that were accepted, and what was set aside as damaged."""
    path, checkpoint, damaged = folder / CONFIG, None, {}
    if checkpoints := list_checkpoints(folder / CHECKPOINTS):
        checkpoint, damaged = _newest(checkpoints)
        recorded = checkpoint.state.get("run")
    elif path.exists():
        try:
            recorded = read_json(path)
        except ValueError as error:
            problem = f"{error}; nothing was trained yet: remove {folder}"
            raise FieldError("folder", problem) from None
    else:
        recorded = description
    if not isinstance(recorded, dict) or not isinstance(recorded.get("train"), dict):
        problem = f"{folder} exists already, and `train` did not make it: choose another name"
        raise FieldError("folder", problem)
    done = 0 if checkpoint is None else checkpoint.step
    ended = done >= description["train"]["steps"]
    changes = () if checkpoint is None else tuple(_changes(recorded, description))
    if changes and (ended or not accept_changes):
        named = [("; ", Field(change.field), f": {change.what}") for change in changes]
        accept = " with ", Field("accept_changes", True)
        why = f"{folder} exists already; without the change it resumes,", *accept, " in spite of it"
        if ended:
            trained = f"{folder} is trained to step {done:,} already; a larger "
            why = trained, Field("steps"), *accept, " continues it"
        rest = ": ", *why, "; another ", Field("folder"), " begins another run"
        raise FieldError(None, *[part for each in named for part in each][1:], *rest)
    aside = {set_aside(each, "damaged"): problem for each, problem in damaged.items()}
    if ended:
        write_json(path, recorded)  # nothing begins, but it may be missing or damaged
    return checkpoint, changes, aside


def _broadcast(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """The checkpoint that the writer has read, in every process."""
    if jax.process_count() == 1:
        return checkpoint
    content = broadcast(
        checkpoint and (checkpoint.step, sorted(checkpoint.arrays), checkpoint.state)
    )
    if content is None:
        return None
    step, names, state = content
    arrays = {}
    for name in names:
        data = to_bytes(checkpoint.arrays[name]) if checkpoint else b""
        arrays[name] = from_bytes(broadcast(data))
    return Checkpoint(step, arrays, state)


def _newest(paths: list[Path]) -> tuple[Checkpoint, dict[Path, str]]:
    """The newest checkpoint that is intact, and what is wrong with those after it."""
    damaged: dict[Path, str] = {}
    for path in reversed(paths):
        try:
            return load_checkpoint(path), damaged
        except Damaged as error:
            damaged[path] = str(error)
        except ValueError as error:
            raise FieldError("folder", str(error)) from None
    problem = f"no checkpoint is intact: {damaged[paths[-1]]}; another "
    raise FieldError(None, problem, Field("folder"), " begins another run")


def _differing(before: Any, after: Any) -> tuple[Any, Any]:
    """Of two sets of the same fields those that are not the same."""
    if not isinstance(before, dict) or not isinstance(after, dict) or before.keys() != after.keys():
        return before, after
    names = [name for name in before if before[name] != after[name]]
    return {name: before[name] for name in names}, {name: after[name] for name in names}


def _changes(recorded: dict[str, Any], now: dict[str, Any]) -> Iterator[Change]:
    """What the weights depend on that is not as it was."""
    # Guidance follows from the network where nobody chose it.
    before, after = (
        each["train"] | each["preparation"] | {"guidance": each["guidance"]}
        for each in (recorded, now)
    )
    for name, value in after.items():
        if name not in _FREE and before[name] != value:
            was, value = _differing(before[name], value)
            yield Change(name, f"was {was}, is {value}")
    was, data = recorded["data"], now["data"]
    if was["shape"] != data["shape"]:
        yield Change("data", f"the images were {was['shape']}, are {data['shape']}")
    elif was["sha256"] != data["sha256"]:
        yield Change("data", "the images or their labels are others")
    known, classes = (each["class_names"] or each["num_classes"] for each in (recorded, now))
    if known != classes:
        yield Change("data", f"the classes were {known}, are {classes}")
    if after["init"] and any(recorded[name] != now[name] for name in _FROM_INIT):
        yield Change("init", "its network or its schedule is another")
