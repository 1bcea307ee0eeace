"""What happens between the steps of a training: samples, measurements, and trackers.

A callback is asked by its `every`, and called with a step and the averaged weights after it. It
returns what it found, by name: figures, for a line of metrics.jsonl, and pictures, uint8
[height, width, 3]. Trackers take both. Callbacks have keys of their own, so the training's bits
are the same with and without them. A new figure is a new callback in `open_callbacks`.
"""

import os
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Dataset, to_bytes
from jax_ddpm.evaluation.distances import main_figure
from jax_ddpm.evaluation.reference import reference_of_images
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import make_folder, replace_file, replacing
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import Drawer, labels_in_turn, make_chain
from jax_ddpm.runs.evaluating import feature_network
from jax_ddpm.runs.figures import class_columns, class_titles, image_grid, save_animation
from jax_ddpm.runs.settings import Settings
from jax_ddpm.samplers import ddim
from jax_ddpm.training.hosts import broadcast, run_on_all, run_on_writer

TRAINING_GIF = "training.gif"
FIGURES = tuple(main_figure(main) for main in ("2048", "features"))
"""The figures, of which a line has one or none, by which the best step is known: the lowest."""
_FRAMES = 100
_BATCH = 256


class Every(NamedTuple):
    """Every `n` steps, and after the `last`; never where `n` is 0."""

    n: int
    last: int

    def __call__(self, steps: range) -> bool:
        """Whether it is time, once these steps are taken."""
        if self.n == 0:
            return False
        return steps.stop // self.n > steps.start // self.n or steps.stop == self.last


Callback = tuple[Every, Callable[[int, Any], Mapping[str, Any]]]
"""When, and what: `(step, params)` to figures and pictures, the same in all processes, each of
which calls."""


def open_callbacks(
    folder: Path, run: DiffusionModel, data: Dataset, settings: Settings, mesh: Mesh
) -> list[Callback]:
    """Those of a training. Nothing is written before the first is called."""
    callbacks = [_measurements(run, data, settings, mesh)] if settings.evaluate_every else []
    if 0 < settings.sampled(settings.steps) <= settings.steps:
        callbacks.append(_samples(folder, run, settings, mesh))
    return callbacks


def samples_on_the_way(folder: Path) -> list[Path]:
    """The pictures `samples/STEP.png` of a run, the earliest first."""
    return sorted(path for path in folder.glob("samples/*.png") if path.stem.isdecimal())


def _samples(folder: Path, run: DiffusionModel, settings: Settings, mesh: Mesh) -> Callback:
    """The pictures `samples/STEP.png` of a training, and at its end `training.gif` of them all;
    always from the same noise, so that one sees them improve."""
    total, every = settings.steps, settings.sampled(settings.steps)
    columns, key = class_columns(run) or 8, jax.random.fold_in(seed_key(settings.seed), 1)
    number, pictures = 2 * columns, folder / "samples"
    labels, drawer = labels_in_turn(run, number), Drawer(run, make_chain(run), ddim(), number, mesh)

    def save(step: int, picture: np.ndarray) -> None:
        from PIL import Image

        make_folder(pictures)
        with replacing(pictures / f"{step:08d}.png") as file:
            Image.fromarray(picture).save(file, format="PNG")
        paths = samples_on_the_way(folder)
        if step == total and len(paths) > 1:
            shown = np.linspace(0, len(paths) - 1, min(len(paths), _FRAMES)).round().astype(int)
            with replacing(folder / TRAINING_GIF) as file:
                save_animation(file, [np.asarray(Image.open(paths[k])) for k in shown], 400)

    def find(step: int, params: Any) -> Mapping[str, Any]:
        (images,) = drawer.batches(key, params, number, labels)
        if not np.isfinite(images).all():
            warnings.warn(f"step {step:,} has no picture: NaN or infinity", stacklevel=2)
            return {}
        picture = image_grid(images, columns, titles=class_titles(run))
        run_on_writer(lambda: save(step, picture))
        return {"samples": picture}

    return Every(every, total), find


def _measurements(run: DiffusionModel, data: Dataset, settings: Settings, mesh: Mesh) -> Callback:
    """How near samples are to the images; always of the same noise."""
    num, key = settings.evaluate_num, jax.random.fold_in(seed_key(settings.seed), 2)
    network = run_on_all(lambda: feature_network(data.image_shape, settings.inception))
    reference = reference_of_images(data, network, num, seed=settings.seed)
    labels, size = labels_in_turn(run, num), min(num, _BATCH)
    drawer = Drawer(run, make_chain(run), ddim(), size, mesh)

    def find(step: int, params: Any) -> Mapping[str, Any]:
        try:
            samples = map(to_bytes, drawer.batches(key, params, num, labels))
            return broadcast(reference.measure(samples, num))
        except FieldError as error:  # samples are not finite
            warnings.warn(f"step {step:,} is not measured: {error}", stacklevel=2)
            return {}

    return Every(settings.evaluate_every or 0, settings.steps), find


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

    Number k of a list `loss_quarters` is called `loss_quarters/k`; None is left out. What trackers
    hold of steps after `step` is replaced. One that fails later costs a warning, and never the
    training. Raises `FieldError`, `ModuleNotFoundError` and `OSError` where one cannot be opened.
    """
    trackers: dict[str, Any] = {}

    def start() -> None:
        for name in dict.fromkeys(names):
            trackers[name] = _TRACKERS[name](folder, description, step)

    def each(action: Callable[[Any], None]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                action(tracker)
            except Exception as error:
                del trackers[name]
                with suppress(Exception):
                    tracker.finish()
                warnings.warn(f"{name} is left out from here on: {_line(error)}", stacklevel=3)

    def log(step: int, values: Mapping[str, Any]) -> None:
        flat: dict[str, Any] = {}
        for name, value in values.items():
            several = enumerate(value) if isinstance(value, list) else ()
            flat |= {f"{name}/{k}": x for k, x in several} or {name: value}
        known = {name: x for name, x in flat.items() if x is not None and name != "step"}
        each(lambda tracker: tracker.log(step, known))

    try:
        run_on_writer(start)
        yield log
    finally:
        each(lambda tracker: tracker.finish())


class _TensorBoard:
    """Event files under `tensorboard/`.

    `SummaryWriter` writes in a thread. A full disk would end the thread, and the writer would wait
    for it for ever. So this object is its file, as others are on S3, and keeps the error.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any], step: int) -> None:
        self._error: OSError | None = None
        import_module("tensorboardX.record_writer").register_writer_factory("jax_ddpm", self)
        self._writer = import_module("tensorboardX").SummaryWriter(
            f"jax_ddpm:{folder / 'tensorboard'}",
            purge_step=step + 1 if step else 0,
            filename_suffix=f".{os.getpid()}.{step:08d}",  # files are named by the second
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        if self._error is not None:
            raise self._error
        for name, value in values.items():
            if isinstance(value, np.ndarray):
                self._writer.add_image(name, value, step, dataformats="HWC")
            else:
                self._writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self._writer.close()

    def directory_check(self, path: str) -> None:
        make_folder(Path(path.partition(":")[2]))

    def open(self, path: str) -> "_TensorBoard":
        self._file = open(path.partition(":")[2], "wb")
        return self

    def write(self, data: bytes) -> None:
        try:
            if self._error is None:
                self._file.write(data)
                self._file.flush()
        except OSError as error:
            self._error = error

    def flush(self) -> None:
        """Nothing is left to write."""

    def close(self) -> None:
        with suppress(OSError):
            self._file.close()


class _WeightsAndBiases:
    """A run of wandb, which goes on where the training does."""

    def __init__(self, folder: Path, description: Mapping[str, Any], step: int) -> None:
        self._wandb, path = import_module("wandb"), folder / "wandb" / "id"
        # Wherever the folder is moved to, it is the same run.
        name = path.read_text() if path.exists() and step else secrets.token_hex(8)
        try:
            self._run = self._wandb.init(
                dir=str(folder),
                project="jax_ddpm",
                name=folder.resolve().name,
                config=dict(description),
                id=name,
                resume="allow",
                allow_val_change=True,  # a resumed run may have been given more steps
            )
        except OSError:
            raise
        except Exception as error:  # such as no key, or no network
            raise FieldError("tracker", f"wandb: {_line(error)}") from None
        make_folder(path.parent)
        replace_file(path, name.encode())

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        # wandb refuses steps that it has already; after a resume those lines are identical.
        if step >= self._run.step:
            image = self._wandb.Image
            given = {k: image(x) if isinstance(x, np.ndarray) else x for k, x in values.items()}
            self._run.log(given, step=step)

    def finish(self) -> None:
        self._run.finish()


_TRACKERS = {"tensorboard": _TensorBoard, "wandb": _WeightsAndBiases}


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
