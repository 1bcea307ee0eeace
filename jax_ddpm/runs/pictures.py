"""The pictures of a run: its loss, the noising of an image, samples, and how they appear."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from jax_ddpm.data import Dataset, to_float
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import draw
from jax_ddpm.runs.figures import (
    class_columns,
    class_titles,
    save_forward,
    save_gif,
    save_grid,
    save_loss,
)
from jax_ddpm.runs.metrics import Progress, read_metrics
from jax_ddpm.runs.run import METRICS, PICTURES, PathLike
from jax_ddpm.samplers import ancestral
from jax_ddpm.training.hosts import is_writer

_STEPS = 200


def save_pictures(
    folder: PathLike,
    run: DiffusionModel,
    data: Dataset,
    *,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Draw from a run that was trained in `folder`, and write all of `PICTURES` there, or none.

    `progress` is that of `draw`. Raises `OSError`.
    """
    frames, columns, schedule = [], class_columns(run) or 8, run.schedule
    samples = draw(
        jax.random.fold_in(seed_key(seed), 1),
        run,
        8 * columns,
        chain=schedule if schedule.num_timesteps <= _STEPS else run.chain(_STEPS),
        sampler=ancestral(),
        progress=progress,
        watch=lambda x_t: frames.append(x_t[: 2 * columns]),
    )
    if not is_writer():
        return
    folder = Path(folder)
    lines = [line for line in read_metrics(folder / METRICS) if line["loss"] is not None]
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    with tempfile.TemporaryDirectory(prefix=".pictures", dir=folder) as new:
        save_grid(Path(new, "samples.png"), samples, columns, class_titles(run))
        save_gif(Path(new, "reverse.gif"), frames, columns, titles=class_titles(run))
        save_forward(Path(new, "forward.png"), schedule, _first(data))
        save_loss(Path(new, "loss.png"), steps, losses)
        for name in PICTURES:
            os.replace(Path(new, name), folder / name)


def _first(data: Dataset) -> np.ndarray:
    """The first image, its upper left where steps draw windows from it."""
    height, width, _ = data.image_shape
    return to_float(data.images[:1])[0, :height, :width]
