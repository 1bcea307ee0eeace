"""Training again in the same folder resumes: from where, what changed, and what is damaged."""

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from optax.tree_utils import tree_set

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data import Preparation
from jax_ddpm.io import checkpoint as files
from jax_ddpm.io.arrays import flatten, from_bytes, to_bytes
from jax_ddpm.io.checkpoint import Checkpoint, Damaged, load_checkpoint
from jax_ddpm.io.files import make_folder, read_json, write_json
from jax_ddpm.runs.metrics import keep_lines, read_metrics
from jax_ddpm.runs.model import CHECKPOINTS, CONFIG, METRICS, PathLike
from jax_ddpm.runs.programs import optimizer
from jax_ddpm.runs.settings import LOG_EVERY, CheckpointSettings, Settings
from jax_ddpm.training import TrainState
from jax_ddpm.training.hosts import broadcast

OVERWRITTEN = ".overwritten"  # checkpoints of another run while they are removed
# How a run is laid out and guarded: its weights do not depend on these.
_FREE = {*CheckpointSettings.__dataclass_fields__, "fsdp", "steps_per_dispatch", "on_nan"}
_FREE |= {"skip_unreadable", "max_pixels", "range"}  # which show in the images
# What else the weights of `init` depend on.
_FROM_INIT = ("model", "scheduler", "image_shape", "num_classes", "null_label")
# Files of a checkpoint, and the fields of a `TrainState` that they hold.
_TREES = {"params": "params", "ema": "ema_params", "optimizer": "opt_state"}


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a run's folder, and lock it for this process until it ends, however it ends."""
    there = {file.name for file in folder.glob("[!.]*")}
    if there and not there & {CONFIG, CHECKPOINTS}:
        raise FieldError("folder", f"{folder} exists already, and is no run: choose another name")
    make_folder(folder / CHECKPOINTS)
    with (folder / ".lock").open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"{folder} is being trained by another process"
            raise FieldError("folder", f"{problem}: wait, or choose another name") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        for leftover in (*folder.glob(".pictures*"), folder / OVERWRITTEN):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def find(
    folder: Path, now: dict[str, Any], settings: Settings, variables: Any, accept: bool, over: bool
) -> Checkpoint | None:
    """Where the training that `now` describes resumes: a model with these variables. Warns of
    changes, and of damage.

    Raises `FieldError` where the folder holds another run, unless that is to be written `over`,
    or the changes are to be `accept`ed and the weights fit.
    """
    newest, damaged = None, {}
    for path in reversed(files.list_checkpoints(folder / CHECKPOINTS)):
        try:
            newest = load_checkpoint(path)
            break
        except Damaged as error:
            damaged[path] = str(error)
        except ValueError as error:  # of a later version
            raise FieldError("folder", str(error)) from None
    was: Any = newest.state.get("run") if newest else {"train": "begun"}
    if not newest:
        with suppress(ValueError):  # what is missing or damaged is ours
            was = read_json(folder / CONFIG)
    foreign = not newest and not damaged and any((folder / CHECKPOINTS).glob("[!.]*"))
    if foreign or not was or not was.get("train"):
        problem = f"{folder} exists already, and `train` did not make it: choose another name"
        raise FieldError("folder", problem)
    ways = ["; another ", Field("folder"), " begins beside it, ", Field("overwrite", True)]
    ways.append(" in its place")
    if newest is None:
        if damaged and not over:
            raise FieldError(None, f"no checkpoint is intact: {[*damaged.values()][0]}", *ways)
        return None

    changes, ended = _changes(was, now), newest.step >= settings.steps
    shapes = {name: array.shape for name, array in newest.arrays["params"].items()}
    fits = shapes == {name: leaf.shape for name, leaf in flatten(variables).items()}
    if over and (changes or not fits or was["train"]["steps"] != settings.steps):
        if settings.init and settings.init.resolve().is_relative_to(folder.resolve()):
            rest = Field("folder"), " begins beside it"
            raise FieldError("init", f"{settings.init} would be overwritten; another ", *rest)
        return None
    named = [part for name, what in changes.items() for part in (Field(name), f": {what}; ")]
    if not fits:
        raise FieldError(None, *named, f"the weights of {folder} are of another network", *ways)
    if changes and (ended or not accept):
        why, accepting = f"{folder} was trained otherwise", Field("accept_changes", True)
        ways += ", ", accepting, " resumes it all the same"
        if ended:
            why = f"{folder} is trained to step {newest.step:,} already"
            ways += " to a larger ", Field("steps")
        raise FieldError(None, *named, why, *ways)

    notes = [f"accepted: {name}: {what}" for name, what in changes.items()]
    for path, problem in damaged.items():
        notes.append(f"{problem}; set aside as {files.set_aside(path, 'damaged').name}")
    for note in notes:
        warnings.warn(note, stacklevel=4)
    if ended:  # no step is left to mend what may be missing or damaged
        write_json(folder / CONFIG, was)
        keep_lines(folder / METRICS, newest.step)
    return _with_optimizer(newest, settings)


def _changes(was: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """What the weights depend on that is not as it was, by setting."""
    before, after = _weighty(was), _weighty(now)
    before["steps"] = max(before["steps"], after["steps"])
    names = [*after, *(name for name in before if name.startswith("unet."))]
    pairs = {name: (before.get(name), after.get(name)) for name in names}
    changes = {name: f"was {old}, is {new}" for name, (old, new) in pairs.items() if old != new}
    if after["init"] and any(was[name] != now[name] for name in _FROM_INIT):
        changes["init"] = "its network or its schedule is another"
    return changes


def _weighty(run: dict[str, Any]) -> dict[str, Any]:
    """What weights depend on, by setting, with defaults for what an older record lacks."""
    values = Settings().record() | Preparation().record() | run["train"] | run["preparation"]
    values |= {f"unet.{name}": value for name, value in (values.pop("unet") or {}).items()}
    data, classes = run["data"], run["class_names"] or run["num_classes"]
    values["data"] = f"{data['shape']}, classes {classes}, SHA-256 {str(data['sha256'])[:12]}"
    values["guidance"] = run["guidance"]
    return {name: value for name, value in values.items() if name not in _FREE}


def _with_optimizer(checkpoint: Checkpoint, settings: Settings) -> Checkpoint:
    """The checkpoint; another optimizer starts anew in it, and the schedule of its rate resumes."""
    params, init = checkpoint.arrays["params"], optimizer(settings).init
    if flatten(jax.eval_shape(init, params)).keys() == checkpoint.arrays["optimizer"].keys():
        return checkpoint
    warnings.warn("the optimizer is another: the weights stay, and it starts anew", stacklevel=5)
    rate, step = "ScaleByScheduleState", np.int32(checkpoint.step)
    state = tree_set(init(params), lambda path, _: path[-1].tuple_name == rate, count=step)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten(state).items()}
    return checkpoint._replace(arrays=checkpoint.arrays | {"optimizer": arrays})


def shared(here: Checkpoint | None) -> Checkpoint | None:
    """What the writer has found, in every process: the others may not see its folder."""
    known = broadcast(here and (here.step, here.state, [*here.arrays]))
    if known is None or jax.process_count() == 1:
        return here
    arrays = {}
    for name in known[2]:
        arrays[name] = from_bytes(broadcast(to_bytes(here.arrays[name]) if here else b""))
    return Checkpoint(known[0], arrays, known[1])


def save_state(folder: PathLike, state: TrainState) -> Path:
    """Write the `TrainState` of your own loop, key included, as the checkpoint of its step.

    Returns the checkpoint's path, `folder/00000STEP`. Checkpoints of other steps are kept.

    Args:
      folder: of the checkpoints, made if need be.
      state: from `make_train_step`; `load_state` reads it again.

    Raises:
      ValueError: a number is not finite.

    Examples:
      >>> from pathlib import Path
      >>> params, optimizer = {"scale": jnp.ones(3)}, optax.adam(1e-3)
      >>> state = ddpm.init_train_state(jax.random.key(0), params, optimizer)
      >>> runs.save_state("checkpoints", state).name  # in the loop, every so many steps
      '00000000'
      >>> state = runs.load_state(max(Path("checkpoints").iterdir()), like=state)  # the newest
    """
    arrays, key = on_host(state, jax.device_get)
    return files.save_checkpoint(folder, int(state.step), arrays, {"key": key})


def on_host(state: TrainState, fetch: Callable[[Any], Any]) -> tuple[dict[str, Any], Any]:
    """A state's trees, by a checkpoint's files, and its key, as JSON holds it."""
    trees = {name: getattr(state, field) for name, field in _TREES.items()}
    arrays, data = fetch((trees, jax.random.key_data(state.key)))
    impl = str(jax.random.key_impl(state.key))
    return arrays, {"impl": impl, "data": None if data is None else data.tolist()}


def load_state(path: PathLike, like: TrainState) -> TrainState:
    """Read a `TrainState` that `save_state` or a training wrote, onto the default device.

    Args:
      path: of one checkpoint, such as `runs/digits/checkpoints/00001500`.
      like: a state of the same structure, or the shapes of one, such as
        `jax.eval_shape(lambda: init_train_state(key, params, optimizer))`.

    Raises:
      ValueError: a file or an array is damaged, missing or of another shape; the message names it.
    """
    return jax.tree.map(jnp.asarray, read_state(load_checkpoint(path), like))


def read_state(checkpoint: Checkpoint, like: TrainState) -> TrainState:
    """The state in a checkpoint, on the host. Raises `ValueError` if it is not one like `like`."""
    trees = {}
    for name, field in _TREES.items():
        try:
            trees[field] = files.restore(getattr(like, field), checkpoint.arrays.get(name, {}))
        except ValueError as error:
            problem = f"the checkpoint of step {checkpoint.step:,} is of another model: {name}"
            raise FieldError(None, f"{problem}: {error}") from None
    key = checkpoint.state["key"]
    key = jax.random.wrap_key_data(jnp.asarray(key["data"], jnp.uint32), impl=key["impl"])
    return TrainState(step=jnp.int32(checkpoint.step), key=key, **trees)


class Findings(NamedTuple):
    """Steps of the checkpoints in a run's folder, and what is wrong, a line for each file."""

    intact: list[int]
    damaged: list[int]
    problems: list[str]


def check_run(folder: PathLike) -> Findings:
    """Read every file of a run, and compare the checkpoints with their SHA-256.

    Args:
      folder: of the run; a `FieldError` is raised if it is none.

    Returns:
      Steps of the checkpoints, `intact` and `damaged`, and `problems`, a line for each file.

    Examples:
      >>> found = runs.check_run("runs/digits")
      >>> found.intact, found.damaged, found.problems
      ([0], [], [])
    """
    folder, train, metrics = Path(folder), None, Path(folder) / METRICS
    if not (folder / CHECKPOINTS).is_dir():
        raise FieldError("folder", f"expected a run's folder, got {folder}")
    intact, damaged, problems = found = Findings([], [], [])
    for path in files.list_checkpoints(folder / CHECKPOINTS):
        try:
            train = load_checkpoint(path).state.get("run", {}).get("train")
            intact.append(int(path.name))
        except ValueError as error:
            problems.append(str(error))
            damaged += [int(path.name)] if isinstance(error, Damaged) else []
    try:
        read_json(folder / CONFIG)
    except ValueError as error:
        problems.append(f"{error}{'; the same training command mends it' if train else ''}")
    lines, step = read_metrics(metrics), max(intact + damaged, default=0)
    last = max((line["step"] for line in lines if line["step"] <= step), default=0)
    if metrics.exists() and (count := metrics.read_bytes().count(b"\n") - len(lines)) > 0:
        what = f"{count} line(s) damaged; the same training command drops them"
        problems.append(f"{metrics}: {what}")
    elif train and step - last >= train.get("log_every", LOG_EVERY):
        problems.append(f"{metrics}: expected lines up to step {step:,}, got {last or 'none'}")
    return found
