"""How likely images are under a run, in bits per dimension, over all devices."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Dataset, load_batch, to_float
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.likelihood import bits_per_dim
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.training.hosts import gather
from jax_ddpm.training.sharding import data_sharding, device_mesh, replicated

_BATCH = 250


def is_8_bit(data: Dataset) -> bool:
    """Whether every pixel is one of 256 levels."""
    if data.images.dtype == np.uint8:
        return True
    images = np.asarray(data.images)
    levels = (images.astype(np.float64) + 1) * 127.5
    # 17 grey levels of scikit-learn's digits are no bins of 1/255.
    return bool(np.allclose(levels, np.round(levels), atol=1e-3))


def score(
    key: Any,
    run: DiffusionModel,
    data: Dataset,
    num: int,
    seed: int,
    progress: Callable[..., Any] | None,
) -> float:
    """The bound in bits per dimension, a mean over `num` of the images, labels below 0 left out."""
    model: Any = run.model
    # Files are often sorted by class.
    chosen = np.random.default_rng(seed).permutation(len(data.images))
    classes = data.labels if run.num_classes else None
    chosen = (chosen if classes is None else chosen[classes[chosen] >= 0])[:num]
    # A batch that the devices divide; what fills the last one is dropped.
    devices = jax.device_count()
    size = -(-min(_BATCH, len(chosen)) // devices) * devices
    mesh = device_mesh(size)
    whole, split = replicated(mesh), data_sharding(mesh)

    def bound(variables, images, labels, first_sample):
        def denoise_fn(x_t, t):
            arguments = (x_t, t) if labels is None else (x_t, t, labels)
            return model.apply(variables, *arguments)

        return bits_per_dim(
            key,
            run.schedule,
            denoise_fn,
            images,
            first_sample=first_sample,
            **run.policy,
        ).total

    places = (whole, split, None if classes is None else split, whole)
    program = jax.jit(bound, in_shardings=places, out_shardings=split)
    weights = jax.jit(lambda tree: tree, out_shardings=whole)(run.variables)
    totals = []
    for first in range(0, len(chosen), size):
        rows = chosen[first : first + size]
        filled = np.arange(size) % len(rows)
        images = load_batch(to_float(data.whole(rows)), filled, split)
        labels = None if classes is None else load_batch(classes[rows], filled, split)
        bits = gather(program(weights, images, labels, np.int32(first)))
        totals.append(bits[: len(rows)])
        if progress:
            progress(Progress(first + len(rows), len(chosen), what="bits per dimension"))
    mean = float(np.mean(np.concatenate(totals)))
    if not np.isfinite(mean):
        raise FieldError(None, f"bits per dimension: expected a finite number, got {mean}")
    return mean
