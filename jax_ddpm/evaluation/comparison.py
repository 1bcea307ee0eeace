"""The figures of generated images against real ones, by name."""

from typing import Any

import numpy as np

from jax_ddpm.evaluation.distances import (
    frechet_distance,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from jax_ddpm.evaluation.extraction import Extracted
from jax_ddpm.evaluation.statistics import Statistics

INCEPTION = "2048"
"""The name of the features that FID is of."""
_NEIGHBOUR = 3
_SUBSET = 1000
_COPY = 0.01


def main_figure(main: str) -> str:
    """What the Fréchet distance of these features is called: "fid" of Inception's alone."""
    return "fid" if main == INCEPTION else "classifier_frechet_distance"


def compare(generated: Extracted, real: Extracted, main: str) -> dict[str, Any]:
    """Fréchet distance of each kind of features, kernel distance, precision and recall of the main
    ones, and the inception score if there are logits; the last three of what was kept."""
    figures = compare_statistics(generated, real.statistics, main)
    kernel = "kid" if main == INCEPTION else "classifier_kernel_distance"
    fewest = min(len(generated.kept), len(real.kept))
    if fewest > 1:
        # Of few images, smaller subsets, which still differ.
        size = _SUBSET if fewest >= _SUBSET else max(2, fewest // 2)
        distance = kernel_distance(real.kept, generated.kept, subset_size=size)
        figures |= {kernel: distance.mean, f"{kernel}_std": distance.std}
    if fewest > _NEIGHBOUR:
        figures |= precision_recall(real.kept, generated.kept, _NEIGHBOUR)._asdict()
    return figures


def compare_statistics(
    generated: Extracted, real: dict[str, Statistics], main: str
) -> dict[str, Any]:
    """Those figures that need no more of the real images than mean and covariance."""
    figures = {}
    for name in sorted(real, key=lambda name: name != main):
        one, other = generated.statistics[name], real[name]
        called = main_figure(main) if name == main else f"{main_figure(main)}_{name}"
        figures[called] = frechet_distance(one.mu, one.sigma, other.mu, other.sigma)
    if (score := generated.score) is not None:
        figures |= {"inception_score": score.mean, "inception_score_std": score.std}
    return figures


def copies(generated: Extracted, real: Extracted) -> dict[str, float]:
    """Whether the model has memorised, by the features kept: the median distance of a generated
    image to the nearest real one, and of a real one to the nearest other; and the share of
    generated images that are nearer than all but 1 % of the real ones are to each other. Where
    nothing is memorised that is about 1 % or less."""
    if len(real.kept) < 2:
        return {}
    apart = nearest_distances(real.kept)
    # Images that are twice in the data say nothing of how near others are.
    differing = apart[apart > 1e-5 * np.median(apart)]
    near = np.quantile(differing, _COPY) if len(differing) else 0.0
    nearest = nearest_distances(generated.kept, real.kept)
    return {
        "nearest": float(np.median(nearest)),
        "nearest_real": float(np.median(apart)),
        "nearer_than_1_percent": float(np.mean(nearest < near)),
    }
