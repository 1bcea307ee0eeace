"""What happens between the steps of a training: samples, measurements, and trackers.

A callback is called with a step and the averaged weights after it. It returns what it found, by
name: figures, which are single numbers, for a line of metrics.jsonl, and pictures, uint8 [height,
width, 3]. Trackers take both. Callbacks have keys of their own, so they change no bit of a
training. A new figure is a new callback in `open_callbacks`.
"""

import os
import secrets
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Dataset, to_bytes
from jax_ddpm.evaluation.distances import main_figure
from jax_ddpm.evaluation.reference import reference_of_images
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import flatten
from jax_ddpm.io.files import make_folder, replace_file, replacing
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import labels_in_turn, make_chain, make_drawer
from jax_ddpm.runs.evaluating import feature_network
from jax_ddpm.runs.figures import class_columns, image_grid, save_animation
from jax_ddpm.runs.settings import Settings
from jax_ddpm.samplers import ddim
from jax_ddpm.training.hosts import broadcast, run_on_all, run_on_writer

TRAINING_GIF = "training.gif"
FIGURES = tuple(main_figure(main) for main in ("2048", "features"))
"""The best step has the lowest of these figures. A line of metrics has one of them, or none."""
_FRAMES = 100
_BATCH = 256


class Every(NamedTuple):
    """Every `n` steps, and after the `last`; never where `n` is 0."""

    n: int
    last: int

    def __call__(self, steps: range) -> bool:
        """Whether it is time, once these steps are taken."""
        n, stop = self.n, steps.stop
        return n > 0 and (stop // n > steps.start // n or stop == self.last)


Callback = tuple[Every, Callable[[int, Any], Mapping[str, Any]]]
"""When, and what: `(step, params)` to figures and pictures, in all processes."""
Tracker = tuple[Callable[[int, Mapping[str, Any]], None], Callable[[], None]]
"""`log(step, values)`, and what ends it."""


def open_callbacks(
    folder: Path, run: DiffusionModel, data: Dataset, settings: Settings, mesh: Mesh
) -> list[Callback]:
    """Those of a training. Nothing is written before the first is called."""
    total, callbacks = settings.steps, []

    def add(every: int, stream: int, num: int, use: Callable[..., Mapping[str, Any]]) -> None:
        """Ask `use(step, batches)` of `num` samples, which are always of the same noise."""
        key = jax.random.fold_in(seed_key(settings.seed), stream)
        batches = make_drawer(run, make_chain(run), ddim(), min(num, _BATCH), mesh)
        labels = labels_in_turn(run, num)

        def find(step: int, params: Any) -> Mapping[str, Any]:
            try:
                return use(step, batches(key, params, num, labels))
            except FieldError as error:  # they are not finite
                warnings.warn(f"step {step:,}: samples are left out: {error}", stacklevel=2)
                return {}

        callbacks.append((Every(every, total), find))

    if settings.evaluate_every:
        num = settings.evaluate_num
        network = run_on_all(lambda: feature_network(data.image_shape, settings.inception))
        reference = reference_of_images(data, network, num, seed=settings.seed)

        def measure(_: int, batches: Iterator[np.ndarray]) -> Mapping[str, Any]:
            return broadcast(reference.measure(map(to_bytes, batches), num))

        add(settings.evaluate_every, 2, num, measure)
    if 0 < settings.sampled(total) <= total:
        columns, titles = class_columns(run)
        columns = columns or 8

        def show(step: int, batches: Iterator[np.ndarray]) -> Mapping[str, Any]:
            picture = image_grid(np.concatenate([*batches]), columns, titles)
            run_on_writer(lambda: _save(folder, step, picture, animate=step == total))
            return {"samples": picture}

        add(settings.sampled(total), 1, 2 * columns, show)
    return callbacks


def samples_on_the_way(folder: Path) -> list[Path]:
    """The pictures `samples/STEP.png` of a run, the earliest first."""
    return sorted(path for path in folder.glob("samples/*.png") if path.stem.isdecimal())


def _save(folder: Path, step: int, picture: np.ndarray, animate: bool) -> None:
    """Write `samples/STEP.png`, and at the end `training.gif` of them all."""
    make_folder(folder / "samples")
    with replacing(folder / f"samples/{step:08d}.png") as file:
        Image.fromarray(picture).save(file, format="PNG")
    paths = samples_on_the_way(folder)
    if animate and len(paths) > 1:
        shown = np.linspace(0, len(paths) - 1, min(len(paths), _FRAMES)).round().astype(int)
        with replacing(folder / TRAINING_GIF) as file:
            save_animation(file, [np.asarray(Image.open(paths[k])) for k in shown], 400)


def best_line(lines: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str] | None:
    """The line whose samples were nearest to the images, the first of equals, and the figure that
    says so: that of the latest line that has one, since one cannot be compared with another."""
    known = [(line, name) for line in lines for name in FIGURES if line.get(name) is not None]
    comparable = [(line, name) for line, name in known if name == known[-1][1]]
    return min(comparable, key=lambda found: found[0][found[1]], default=None)


@contextmanager
def open_trackers(
    names: Sequence[str], folder: Path, description: Mapping[str, Any], step: int
) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """`log(step, values)`, which sends figures and pictures to the trackers of these names.

    Number k of a list is called `loss_quarters/k`; None is left out. What trackers hold of steps
    after `step` is replaced. One that fails costs a warning, and never the training, unless it
    cannot be opened: `FieldError`, `ModuleNotFoundError` or `OSError`.
    """
    trackers: dict[str, Tracker] = {}

    def start() -> None:
        for name in set(names):
            trackers[name] = _TRACKERS[name](folder, description, step)

    def end(name: str) -> None:
        with suppress(Exception):
            trackers.pop(name)[1]()

    def log(step: int, values: Mapping[str, Any]) -> None:
        known = {name: x for name, x in flatten(dict(values)).items() if name != "step"}
        for name in [*trackers]:
            try:
                trackers[name][0](step, known)
            except Exception as error:
                warnings.warn(f"{name} is left out from here on: {error!r}", stacklevel=2)
                end(name)

    try:
        run_on_writer(start)
        yield log
    finally:
        for name in [*trackers]:
            end(name)


def _tensorboard(folder: Path, description: Mapping[str, Any], step: int) -> Tracker:
    """An event file under `tensorboard/`, written here: the thread of tensorboardX's
    `SummaryWriter` ends where the disk is full, and the training would wait for it for ever."""
    summary = import_module("tensorboardX.summary")
    event = import_module("tensorboardX.proto.event_pb2").Event
    path = folder / f"tensorboard/events.out.tfevents.{time.time():.0f}.{os.getpid()}.{step:08d}"
    make_folder(path.parent)
    file = import_module("tensorboardX").RecordWriter(str(path))

    def write(**fields: Any) -> None:
        file.write(event(wall_time=time.time(), **fields).SerializeToString())

    def log(step: int, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                write(step=step, summary=summary.image(name, value, dataformats="HWC"))
            else:
                write(step=step, summary=summary.scalar(name, value))
        file.flush()

    write(file_version="brain.Event:2")
    # TensorBoard then hides what earlier files have of this step and of later ones.
    write(step=step + 1 if step else 0, session_log={"status": "START"})
    return log, file.close


def _wandb(folder: Path, description: Mapping[str, Any], step: int) -> Tracker:
    """A run of Weights & Biases, which resumes with the training."""
    wandb, path = import_module("wandb"), folder / "wandb" / "id"
    # Wherever the folder is moved to, it is the same run.
    name = path.read_text() if path.exists() and step else secrets.token_hex(8)
    options = {"project": "jax_ddpm", "name": folder.resolve().name, "config": dict(description)}
    options |= {"dir": str(folder), "id": name, "resume": "allow"}
    try:
        # A resumed run may have been given more steps.
        run = wandb.init(**options, allow_val_change=True)
    except Exception as error:  # such as no key, or no network
        raise FieldError("tracker", f"wandb: {error}") from None
    make_folder(path.parent)
    replace_file(path, name.encode())

    def log(step: int, values: Mapping[str, Any]) -> None:
        pictures = {k: wandb.Image(x) for k, x in values.items() if isinstance(x, np.ndarray)}
        run.log({**values, **pictures}, step=step)  # wandb ignores steps that it has already

    return log, run.finish


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb}
