"""Samples on the way: the same noise every time, so that one sees them improve."""

import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import make_folder, replacing
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import Drawer, labels_in_turn, make_chain
from jax_ddpm.runs.figures import class_columns, class_titles, image_grid, save_animation
from jax_ddpm.runs.settings import Settings
from jax_ddpm.samplers import ddim
from jax_ddpm.training.hosts import run_on_writer

TRAINING_GIF = "training.gif"
_FOLDER = "samples"
_ROWS = 2
_FRAMES = 100


class Previews:
    """The pictures `samples/STEP.png` of a training, and at its end `training.gif` of them all.

    They are drawn between two dispatches, with keys of their own: the training's bits are the same
    with and without them.
    """

    def __init__(
        self, folder: Path, run: DiffusionModel, settings: Settings, mesh: Mesh, done: int
    ) -> None:
        """Of a training that resumes after `done` steps: what was drawn later is removed."""
        self._folder, self._run, self._mesh = folder, run, mesh
        self._done, self._total = done, settings.steps
        self._every = settings.sampled(self._total)
        self._columns = class_columns(run) or 8
        self._number = _ROWS * self._columns
        self._key = jax.random.fold_in(seed_key(settings.seed), 1)
        self._drawer = None
        run_on_writer(self._remove_later)

    def due(self, step: int) -> bool:
        """Whether a multiple of the interval was passed since this was last asked, or all were."""
        before, self._done = self._done, step
        if not 0 < self._every <= step:
            return False
        return step // self._every > before // self._every or step == self._total

    def _remove_later(self) -> None:
        for step, path in self._drawn():
            if step > self._done:
                path.unlink()
        (self._folder / TRAINING_GIF).unlink(missing_ok=True)

    def draw(self, step: int, params: Any) -> np.ndarray | None:
        """Draw from these weights, in all processes; the picture, uint8 [height, width, 3], or None
        where samples are not finite, which is warned of."""
        if self._drawer is None:
            chain = make_chain(self._run)
            self._drawer = Drawer(self._run, chain, ddim(), self._number, self._mesh)
        labels = labels_in_turn(self._run, self._number)
        (images,) = self._drawer.batches(self._key, params, self._number, labels)
        if not np.isfinite(images).all():
            return warnings.warn(f"step {step:,} has no picture: NaN or infinity", stacklevel=2)
        picture = image_grid(images, self._columns, titles=class_titles(self._run))
        run_on_writer(lambda: self._save(step, picture))
        return picture

    def _save(self, step: int, picture: np.ndarray) -> None:
        from PIL import Image

        make_folder(self._folder / _FOLDER)
        with replacing(self._folder / _FOLDER / f"{step:08d}.png") as file:
            Image.fromarray(picture).save(file, format="PNG")

    def finish(self) -> None:
        """Write the GIF of all of them, or of 100 evenly among them."""
        run_on_writer(self._animate)

    def _animate(self) -> None:
        from PIL import Image

        drawn = self._drawn()
        if len(drawn) > 1:
            shown = np.linspace(0, len(drawn) - 1, min(len(drawn), _FRAMES)).round().astype(int)
            pictures = [np.asarray(Image.open(drawn[place][1])) for place in shown]
            with replacing(self._folder / TRAINING_GIF) as file:
                save_animation(file, pictures, 400)

    def _drawn(self) -> list[tuple[int, Path]]:
        paths = sorted((self._folder / _FOLDER).glob("*.png"))
        return [(int(path.stem), path) for path in paths if path.stem.isdigit()]
