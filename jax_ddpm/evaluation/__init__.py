"""How far generated images are from real ones: FID and its kin, equal to torch-fidelity's.

    images ─ network ─▶ features ─▶ mean, covariance ─▶ frechet_distance
                                └─▶ some are kept ─▶ kernel_distance, precision_recall, …

Networks run jitted over all devices; figures are computed on the host in float64.
"""

from jax_ddpm.evaluation.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from jax_ddpm.evaluation.features import (
    FeatureNetwork,
    Statistics,
    load_inception,
    load_statistics,
    save_statistics,
    statistics,
    train_classifier,
)

__all__ = [
    "frechet_distance", "inception_score", "kernel_distance", "nearest_distances",
    "precision_recall", "FeatureNetwork", "Statistics", "load_inception", "load_statistics",
    "save_statistics", "statistics", "train_classifier",
]  # fmt: skip
