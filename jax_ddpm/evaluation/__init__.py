"""How far generated images are from real ones: FID and its kin, equal to torch-fidelity's.

    images ─ network ─▶ features ─▶ mean, covariance ─▶ frechet_distance
                                └─▶ some are kept ─▶ kernel_distance, precision_recall, …

Networks run jitted over all devices; figures are computed on the host in float64.
"""

from jax_ddpm.evaluation.distances import (
    KernelDistance,
    PrecisionRecall,
    Score,
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
)
from jax_ddpm.evaluation.features import FeatureNetwork, load_inception, train_classifier
from jax_ddpm.evaluation.statistics import Statistics, load_statistics, save_statistics, statistics

__all__ = [
    "FeatureNetwork",
    "KernelDistance",
    "PrecisionRecall",
    "Score",
    "Statistics",
    "frechet_distance",
    "inception_score",
    "kernel_distance",
    "load_inception",
    "load_statistics",
    "nearest_distances",
    "precision_recall",
    "save_statistics",
    "statistics",
    "train_classifier",
]
