"""Figures on the way: how near a training's samples are to its images, and which step was best."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Dataset, to_bytes
from jax_ddpm.evaluation.distances import main_figure
from jax_ddpm.evaluation.reference import reference_of_images
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import Drawer, labels_in_turn, make_chain
from jax_ddpm.runs.evaluating import feature_network
from jax_ddpm.runs.settings import Settings
from jax_ddpm.samplers import ddim
from jax_ddpm.training.hosts import broadcast, run_on_all

FIGURES = tuple(main_figure(main) for main in ("2048", "features"))
"""What may be in a line of metrics, and decides which is best: the lowest."""
_BATCH = 256


def best_line(lines: Iterable[Mapping[str, Any]]) -> tuple[Mapping[str, Any], str] | None:
    """The line of metrics whose samples were nearest to the images, the first of equals, and the
    figure that says so: that of the last line that has one, since others have other scales."""
    lines = list(lines)
    found = [name for line in lines for name in FIGURES if line.get(name) is not None]
    if not found:
        return None
    name = found[-1]
    return min((line for line in lines if line.get(name) is not None), key=lambda x: x[name]), name


class Watch:
    """Measures samples every so many steps, always from the same noise: between two dispatches, so
    that the training's bits are the same with it and without."""

    best: int | None = None
    """The step whose samples were nearest to the images."""

    def __init__(
        self,
        run: DiffusionModel,
        data: Dataset,
        settings: Settings,
        mesh: Mesh,
        done: int,
        lines: Iterable[Mapping[str, Any]],
    ) -> None:
        """Of a training that resumes after `done` steps, with these lines of metrics."""
        self._run, self._settings, self._done = run, settings, done
        self._least = np.inf
        if not settings.evaluate_every or done == settings.steps:
            return
        num = settings.evaluate_num
        network = run_on_all(lambda: feature_network(data.image_shape, settings.inception))
        self._figure = main_figure("features" if network is None else network.main)
        for line in lines:
            self._compare(line["step"], line)
        self._reference = reference_of_images(data, network, num, seed=settings.seed)
        self._labels = labels_in_turn(run, num)
        self._drawer = Drawer(run, make_chain(run), ddim(), min(num, _BATCH), mesh)

    def due(self, step: int) -> bool:
        """Whether a multiple of the interval was passed since this was last asked, or all were."""
        before, self._done = self._done, step
        every = self._settings.evaluate_every
        if not every:
            return False
        return step // every > before // every or step == self._settings.steps

    def measure(self, step: int, params: Any) -> dict[str, Any]:
        """Figures of samples from these weights, the same in all processes; none where samples are
        not finite, which is warned of."""
        num = self._settings.evaluate_num
        key = jax.random.fold_in(seed_key(self._settings.seed), 2)
        samples = map(to_bytes, self._drawer.batches(key, params, num, self._labels))
        try:
            figures = broadcast(self._reference.measure(samples, num))
        except FieldError as error:
            warnings.warn(f"step {step:,} is not measured: {error}", stacklevel=2)
            return {}
        self._compare(step, figures)
        return figures

    def _compare(self, step: int, figures: Mapping[str, Any]) -> None:
        value = figures.get(self._figure)
        if value is not None and value < self._least:
            self._least, self.best = value, step
