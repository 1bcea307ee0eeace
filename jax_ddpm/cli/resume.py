"""The same command resumes a run where it stopped: which folder, what changed, from where.

nothing there        begin
config.json alone    begin again: no checkpoint was reached
checkpoints/         resume from the newest that is intact; what is damaged is set aside
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jax_ddpm.cli.config import TrainConfig, UsageError, writing
from jax_ddpm.cli.runs import CHECKPOINTS, PICTURES, Run, describe
from jax_ddpm.io.arrays import from_bytes, to_bytes
from jax_ddpm.io.checkpoint import (
    Checkpoint,
    Damaged,
    list_checkpoints,
    load_checkpoint,
    set_aside,
)
from jax_ddpm.io.files import make_folder
from jax_ddpm.io.json import read_json, write_json
from jax_ddpm.training.hosts import from_writer, is_writer, together

__all__ = ["Place", "begin", "locked", "open_run", "what_is_saved"]

# Where a run is, how it is laid out and guarded: its weights do not depend on them.
_FREE = {
    "accept_changes",
    "checkpoint_every",
    "data",  # its digest says more than its path
    "dataset",
    "devices",
    "fsdp",
    "keep",
    "keep_every",
    "name",
    "on_nan",
    "out",
    "steps_per_dispatch",
}
_OURS = ("config.json", CHECKPOINTS)
# What else the weights of `--init` depend on.
_FROM_INIT = ("model", "scheduler", "image_shape", "num_classes", "null_label", "guidance")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the run's folder, and hold it for this process alone until it ends, however it ends.

    Raises `UsageError` for a folder of something else, and for one that another process holds.
    """
    with writing("--out", folder):
        if folder.is_dir() and not any((folder / name).exists() for name in _OURS):
            if any(not file.name.startswith(".") for file in folder.iterdir()):
                raise UsageError(f"--name: {folder} exists already, and is no run: choose another")
        make_folder(folder)
        lock = (folder / ".lock").open("a")
        for leftover in folder.glob(".pictures*"):
            shutil.rmtree(leftover, ignore_errors=True)
    with lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"--name: {folder} is being trained by another process: wait for its end, or "
                "choose another name"
            ) from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        yield


class Place(NamedTuple):
    """The folder of a run, what its config.json says, and the checkpoint to resume from, if any."""

    folder: Path
    description: dict[str, Any]
    checkpoint: Checkpoint | None


def open_run(folder: Path, config: TrainConfig, run: Run, images: dict[str, Any]) -> Place:
    """Find where to resume: the process that writes looks into the folder, and tells the others.

    Raises `UsageError` if the folder holds something else, if the run was another one (what
    changed, and the flag that allows it), or if none of its checkpoints is intact.
    """
    description = describe(run, config, images)
    checkpoint = together(lambda: _open(folder, config, description) if is_writer() else None)
    return Place(folder, description, _everywhere(checkpoint))


def begin(place: Place) -> None:
    """From here on the folder is of what `place` describes: there are no pictures of it yet."""
    write_json(place.folder / "config.json", place.description)
    make_folder(place.folder / CHECKPOINTS)
    for name in PICTURES:
        (place.folder / name).unlink(missing_ok=True)


def _open(folder: Path, config: TrainConfig, description: dict[str, Any]) -> Checkpoint | None:
    path = folder / "config.json"
    checkpoints = list_checkpoints(folder / CHECKPOINTS)
    checkpoint, damaged = None, {}
    if checkpoints:
        checkpoint, damaged = _newest(checkpoints)
        recorded = checkpoint.state.get("run")
    elif path.exists():
        try:
            recorded = read_json(path)
        except ValueError as error:
            raise UsageError(f"{error}; nothing was trained yet: remove {folder}") from None
    else:
        recorded = description
    if not isinstance(recorded, dict) or not isinstance(recorded.get("train"), dict):
        raise UsageError(
            f"--name: {folder} exists already, and `train` did not make it: choose another name"
        )
    changes = "; ".join(_changes(recorded, description))
    if changes and checkpoint is not None and checkpoint.step >= config.steps:
        raise UsageError(
            f"{changes}: {folder} is trained to step {checkpoint.step:,} already; --name begins "
            "another run, a larger --steps continues this one"
        )
    if changes and not config.accept_changes:
        raise UsageError(
            f"{changes}: {folder} exists already; without the change it resumes, with "
            "--accept-changes in spite of it; --name begins another run"
        )
    if changes:
        print(f"accepted: {changes}")
    for each, problem in damaged.items():
        print(f"{problem}; set aside as {set_aside(each, 'damaged').name}")
    if checkpoint is not None and checkpoint.step >= config.steps:
        write_json(path, recorded)  # nothing begins, but it may be missing or damaged
    return checkpoint


def what_is_saved(folder: Path) -> str:
    """From where the command that trains this run would resume, for its last line."""
    paths = list_checkpoints(folder / CHECKPOINTS)
    if not paths:
        return "nothing was saved yet"
    return f"step {int(paths[-1].name):,} is saved: the same command resumes from there"


def _everywhere(checkpoint: Checkpoint | None) -> Checkpoint | None:
    """What the process that writes has read."""
    if jax.process_count() == 1:
        return checkpoint
    content = checkpoint and (checkpoint.step, sorted(checkpoint.arrays), checkpoint.state)
    content = json.loads(from_writer(json.dumps(content).encode()))
    if content is None:
        return None
    step, names, state = content
    arrays = {}
    for name in names:
        data = to_bytes(checkpoint.arrays[name]) if checkpoint else b""
        arrays[name] = from_bytes(from_writer(data))
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
            raise UsageError(str(error)) from None
    raise UsageError(f"no checkpoint is intact: {damaged[paths[-1]]}; --name begins another run")


def _changes(recorded: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What of the weights' origin is not as it was: `--flag: was …, is …`."""
    # What an older version did not know was as it is by default.
    before = json.loads(json.dumps(asdict(TrainConfig()), default=str)) | recorded["train"]
    after = now["train"]
    lines = [
        f"--{name.replace('_', '-')}: was {before[name]}, is {value}"
        for name, value in after.items()
        if name not in _FREE and before[name] != value
    ]
    if recorded.get("data") != now["data"]:
        before, shape = recorded.get("data"), now["data"]["shape"]
        was = before.get("shape") if isinstance(before, dict) else None
        what = f"were {was}, are {shape}" if was != shape else "or their labels are others"
        lines.append(f"--data: the images {what}")
    if after["init"] and any(recorded.get(name) != now[name] for name in _FROM_INIT):
        lines.append("--init: its network or its schedule is another")
    return lines
