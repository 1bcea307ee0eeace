"""Where the lines of a training go beside metrics.jsonl: TensorBoard, Weights & Biases.

A tracker is a convenience: one that fails costs a warning, and never the training.
"""

import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jax_ddpm._errors import FieldError, check_choice
from jax_ddpm.io.files import make_folder, replace_file
from jax_ddpm.training.hosts import is_writer, run_on_all

_PROJECT = "jax_ddpm"


class Tracker(Protocol):
    """What takes the lines of a training, and pictures."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Take a line of metrics.jsonl: its `step`, and numbers, lists of numbers, or None.

        Number k of a list `loss_quarters` is called `loss_quarters/k`; None is left out.
        """
        ...

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Take a picture of that step, uint8 [height, width, 3]."""
        ...

    def close(self) -> None:
        """Write what is not written yet; nothing may be called after it."""
        ...


@contextmanager
def open_trackers(
    names: Sequence[Literal["tensorboard", "wandb"]],
    folder: Path,
    description: Mapping[str, Any],
    step: int,
) -> Iterator[Tracker]:
    """One tracker that passes on to those named; with none, and where files are not written, idle.

    Every process of a training has to call this. A tracker that fails later is warned of once and
    left out.

    Args:
      names: which of them.
      folder: of the run.
      description: of the run, as in its config.json.
      step: how many steps were taken: what trackers hold of later ones is replaced.

    Raises:
      FieldError: of the field "tracker": no such tracker, or one that cannot be opened.
      ModuleNotFoundError: the package of one is missing.
      OSError: something cannot be written.
    """
    for name in names:
        check_choice("tracker", name, tuple(_KINDS))
    trackers = _Trackers()
    try:
        if names:
            run_on_all(lambda: trackers.open(names, folder, description, step))
        yield trackers
    finally:
        trackers.close()


class _Trackers:
    """Passes on to several, as long as each of them works."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}

    def open(
        self, names: Sequence[str], folder: Path, description: Mapping[str, Any], step: int
    ) -> None:
        """Open them, in the process that writes."""
        for name in dict.fromkeys(names) if is_writer() else ():
            self._open[name] = _KINDS[name](folder, description, step)

    def log(self, line: Mapping[str, Any]) -> None:
        self._each(lambda tracker: tracker.log(line))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._each(lambda tracker: tracker.picture(step, name, image))

    def close(self) -> None:
        self._each(lambda tracker: tracker.close())
        self._open = {}

    def _each(self, action: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                action(tracker)
            except Exception as error:
                del self._open[name]
                with suppress(Exception):
                    tracker.close()
                warnings.warn(f"{name} is left out from here on: {_line(error)}", stacklevel=3)


class _TensorBoard:
    """Event files under `tensorboard/`."""

    def __init__(self, folder: Path, description: Mapping[str, Any], step: int) -> None:
        # Not a `SummaryWriter`: its thread dies of a full disk, and it then waits for it for ever.
        self._proto = import_module("tensorboardX.proto.event_pb2")
        self._summary = import_module("tensorboardX.summary")
        writer = import_module("tensorboardX.event_file_writer")
        make_folder(folder / "tensorboard")
        # Files are named by the second.
        self._file = writer.EventsWriter(
            str(folder / "tensorboard/events"), f".{os.getpid()}.{step:08d}"
        )
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        # It hides what older files hold from that step on: a SummaryWriter's `purge_step`.
        self._write(step + 1 if step else 0, session_log=start)

    def log(self, line: Mapping[str, Any]) -> None:
        for name, value in _scalars(line).items():
            self._write(line["step"], summary=self._summary.scalar(name, value))
        self._file.flush()

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._write(step, summary=self._summary.image(name, image, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, **what: Any) -> None:
        self._file.write_event(self._proto.Event(step=step, wall_time=time.time(), **what))


class _WeightsAndBiases:
    """A run of wandb, which goes on where the training does."""

    def __init__(self, folder: Path, description: Mapping[str, Any], step: int) -> None:
        self._wandb = import_module("wandb")
        try:
            self._run = self._wandb.init(
                dir=str(folder),
                project=_PROJECT,
                name=folder.resolve().name,
                config=dict(description),
                id=_kept_id(folder / "wandb" / "id"),
                resume="allow",
                allow_val_change=True,  # a resumed run may have been given more steps
            )
        except OSError:
            raise
        except Exception as error:  # such as no key, or no network
            raise FieldError("tracker", f"wandb: {_line(error)}") from None

    def log(self, line: Mapping[str, Any]) -> None:
        self._log(line["step"], _scalars(line))

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._log(step, {name: self._wandb.Image(image)})

    def close(self) -> None:
        self._run.finish()

    def _log(self, step: int, values: dict[str, Any]) -> None:
        # wandb refuses steps that it has already; after a resume those lines are identical.
        if step >= self._run.step:
            self._run.log(values, step=step)


_KINDS: dict[str, Callable[[Path, Mapping[str, Any], int], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


def _kept_id(path: Path) -> str:
    """What wandb calls the run of this folder, here and wherever the folder is moved to."""
    if not path.exists():
        make_folder(path.parent)
        replace_file(path, secrets.token_hex(8).encode())
    return path.read_text()


def _scalars(line: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line but for its step, by name."""
    values: dict[str, Any] = {}
    for name, value in line.items():
        if isinstance(value, list | tuple):
            values |= {f"{name}/{k}": each for k, each in enumerate(value)}
        elif name != "step":
            values[name] = value
    return {name: value for name, value in values.items() if value is not None}


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
