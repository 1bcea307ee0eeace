"""Training again in the same folder resumes: from where, what changed, and what is damaged.

nothing there        begin
config.json alone    begin again, as the settings are now: no checkpoint was reached
checkpoints/         resume from the newest that is intact; what is damaged is set aside
"""

import re
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
from jax_ddpm.io import checkpoint as files
from jax_ddpm.io.arrays import flatten, from_bytes, to_bytes
from jax_ddpm.io.checkpoint import Checkpoint, Damaged, load_checkpoint
from jax_ddpm.io.files import make_folder, read_json, write_json
from jax_ddpm.runs.metrics import damaged_lines, read_metrics
from jax_ddpm.runs.model import CHECKPOINTS, CONFIG, FILES, METRICS, PathLike
from jax_ddpm.runs.programs import optimizer
from jax_ddpm.runs.settings import LOG_EVERY, CheckpointSettings, Settings
from jax_ddpm.training import TrainState
from jax_ddpm.training.hosts import broadcast

OVERWRITTEN = ".overwritten"
"""What another run's checkpoints are called while they are removed."""
# How a run is laid out and guarded: its weights do not depend on these.
_FREE = {*CheckpointSettings.__dataclass_fields__, "fsdp", "steps_per_dispatch", "on_nan"}
_FREE |= {"skip_unreadable", "max_pixels", "range"}  # which show in the images
# What else the weights of `init` depend on.
_FROM_INIT = ("model", "scheduler", "image_shape", "num_classes", "null_label")
# Files of a checkpoint, and the fields of a `TrainState` that they hold.
_TREES = {"params": "params", "ema": "ema_params", "optimizer": "opt_state"}


class Found(NamedTuple):
    """What a folder holds for a training: nothing, where it begins."""

    checkpoint: Checkpoint | None = None
    changes: tuple[tuple[str, str], ...] = ()
    """Settings that are not as they were, which was accepted, and what they were."""
    damaged: tuple[str, ...] = ()
    """What was wrong with the checkpoints that were set aside."""


@contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Make a run's folder, and lock it for this process until it ends, however it ends."""
    if folder.is_dir() and not any((folder / name).exists() for name in (CONFIG, CHECKPOINTS)):
        if any(not file.name.startswith(".") for file in folder.iterdir()):
            problem = f"{folder} exists already, and is no run: choose another name"
            raise FieldError("folder", problem)
    make_folder(folder)
    with (folder / ".lock").open("a") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            problem = f"{folder} is being trained by another process: wait for its end, or choose"
            raise FieldError("folder", f"{problem} another name") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        for leftover in (*folder.glob(".pictures*"), folder / OVERWRITTEN):
            shutil.rmtree(leftover, ignore_errors=True)
        yield


def find(
    folder: Path, now: dict[str, Any], settings: Settings, variables: Any, accept: bool, over: bool
) -> Found:
    """Where the training that `now` describes resumes: a model with these variables.

    Raises `FieldError` where the folder holds another run, unless that is to be written `over`,
    or the changes are to be `accept`ed and the weights fit.
    """
    paths, newest, damaged = files.list_checkpoints(folder / CHECKPOINTS), None, {}
    while newest is None and len(damaged) < len(paths):
        path = paths[-1 - len(damaged)]
        try:
            newest = load_checkpoint(path)
        except Damaged as error:
            damaged[path] = str(error)
        except ValueError as error:  # of a later version
            raise FieldError("folder", str(error)) from None
    ways = "another {folder} begins beside it, {overwrite} in its place"
    if paths and newest is None and not over:
        problem = f"no checkpoint is intact: {damaged[paths[-1]]}; "
        raise FieldError(None, problem, *_naming(ways))
    if newest is None and (paths or not (folder / CONFIG).exists()):
        return Found()
    was: Any = None
    with suppress(ValueError):
        was = newest.state.get("run") if newest else read_json(folder / CONFIG)
    if not was or not was.get("train"):
        problem = f"{folder} exists already, and `train` did not make it: choose another name"
        raise FieldError("folder", problem)
    if newest is None:
        return Found()

    changes = tuple(_changes(was, now))
    if over and (changes or was["train"]["steps"] != settings.steps):
        return Found()
    before = {name: array.shape for name, array in newest.arrays["params"].items()}
    fits = before == {name: leaf.shape for name, leaf in flatten(variables).items()}
    ended = newest.step >= settings.steps
    if changes and not (accept and fits and not ended):
        if not fits:
            why = f"the weights of {folder} are of another network"
        elif ended:
            why = f"{folder} is trained to step {newest.step:,} already"
            ways += ", a larger {steps} with {accept_changes} continues it"
        else:
            why = f"{folder} was trained otherwise"
            ways += ", {accept_changes} resumes it all the same"
        named = [part for name, what in changes for part in ("; ", Field(name), f": {what}")]
        raise FieldError(None, *named[1:], f": {why}; ", *_naming(ways))
    if ended:
        write_json(folder / CONFIG, was)  # nothing begins, but it may be missing or damaged
    aside = {files.set_aside(path, "damaged"): problem for path, problem in damaged.items()}
    notes = tuple(f"{problem}; set aside as {path.name}" for path, problem in aside.items())
    return Found(_with_optimizer(newest, settings), changes, notes)


def _naming(text: str) -> list[str | Field]:
    """The pieces of a message; words in braces are settings."""
    values = {"overwrite": True, "accept_changes": True}
    pieces = enumerate(re.split("[{}]", text))
    return [Field(x, values.get(x)) if place % 2 else x for place, x in pieces]


def _changes(was: dict[str, Any], now: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What the weights depend on that is not as it was."""
    # Guidance follows from the network where nobody chose it.
    before, after = (
        each["train"] | each["preparation"] | {"guidance": each["guidance"]} for each in (was, now)
    )
    for name, value in after.items():
        old = before.get(name, value)  # an older version did not have every setting
        longer = name == "steps" and value > old
        if name not in _FREE and old != value and not longer:
            yield name, f"was {old}, is {value}"
    shapes, digests = ([x["data"][name] for x in (was, now)] for name in ("shape", "sha256"))
    classes = [each["class_names"] or each["num_classes"] for each in (was, now)]
    for what, (old, new) in (("images", shapes), ("classes", classes)):
        if old != new:
            yield "data", f"the {what} were {old}, are {new}"
    if shapes[0] == shapes[1] and digests[0] != digests[1]:
        yield "data", "the images or their labels are others"
    if after["init"] and any(was[name] != now[name] for name in _FROM_INIT):
        yield "init", "its network or its schedule is another"


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


def shared(found: Found | None) -> Found:
    """What the writer has found, in every process."""
    found = found or Found()
    here = found.checkpoint
    if jax.process_count() == 1 or not broadcast(here is not None):
        return found
    arrays, known = {}, here and (here.step, here.state, sorted(here.arrays))
    step, state, names = broadcast(known or (0, {}, []))
    for name in names:
        arrays[name] = from_bytes(broadcast(to_bytes(here.arrays[name]) if here else b""))
    return found._replace(checkpoint=Checkpoint(step, arrays, state))


def save_state(folder: PathLike, state: TrainState) -> Path:
    """Write a whole `TrainState`, its typed key included, as the checkpoint of its step.

    Returns the checkpoint's folder, `folder/00000STEP`. Raises `ValueError` if a number is not
    finite, and `OSError`; whatever was there before is untouched then.
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
            trees[field] = files.restore(getattr(like, field), checkpoint.arrays.get(name, {}))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    key = checkpoint.state["key"]
    key = jax.random.wrap_key_data(jnp.asarray(key["data"], jnp.uint32), impl=key["impl"])
    return TrainState(step=jnp.int32(checkpoint.step), key=key, **trees)


class Findings(NamedTuple):
    """What is in a run's folder: steps of checkpoints that are to the bit what was written, and of
    those that are not; what is no damage; and what is wrong, a line for each file."""

    intact: list[int]
    damaged: list[int]
    notes: list[str]
    problems: list[str]


def check_run(folder: PathLike) -> Findings:
    """Read all of a run. Raises `FieldError` if `folder` is not a run's."""
    folder, run = Path(folder), {}
    if not (folder / CHECKPOINTS).is_dir():
        raise FieldError("folder", f"expected a run's folder, got {folder}")
    intact, damaged, notes, problems = found = Findings([], [], [], [])
    for path in files.list_checkpoints(folder / CHECKPOINTS):
        try:
            run = load_checkpoint(path).state.get("run") or {}
            intact.append(int(path.name))
        except ValueError as error:
            problems.append(str(error))
            damaged += [int(path.name)] * isinstance(error, Damaged)
    train = run.get("train")
    try:
        # It may say already what the next checkpoint will: a difference is no damage.
        content, names = read_json(folder / CONFIG), run.keys() - {"train", "versions"}
        if differing := sorted(name for name in names if content.get(name) != run[name]):
            notes.append(f"{CONFIG}: {', '.join(differing)} not as in the newest checkpoint")
    except ValueError as error:
        problems.append(f"{error}{'; the same training command mends it' if train else ''}")
    metrics, step = folder / METRICS, max(intact + damaged, default=0)
    last = max((x["step"] for x in read_metrics(metrics) if x["step"] <= step), default=0)
    if count := damaged_lines(metrics):
        remedy = "the same training command drops them"
        problems.append(f"{metrics}: {count} line(s) damaged; {remedy}")
    elif train and step - last >= train.get("log_every", LOG_EVERY):
        problems.append(f"{metrics}: expected lines up to step {step:,}, got {last or 'none'}")
    for path in sorted((folder / CHECKPOINTS).glob(".*")):
        what = "a leftover, which the next save removes"
        notes.append(f"{path.name}: {what if path.suffix in files.LEFTOVERS else 'set aside'}")
    return found


def is_whole(folder: Path) -> bool:
    """Whether a run has all of its files, and no damaged line of metrics."""
    return all((folder / name).exists() for name in FILES) and not damaged_lines(folder / METRICS)
