"""How far generated images are from real ones: FID and its kin, equal to torch-fidelity's.

    images ─ network ─▶ features ─▶ mean, covariance ─▶ frechet_distance
                                └─▶ some are kept ─▶ kernel_distance, precision_recall, …

Networks run jitted over all devices; figures are computed on the host in float64.
"""

from jax_ddpm.evaluation.distances import KernelDistance as KernelDistance
from jax_ddpm.evaluation.distances import PrecisionRecall as PrecisionRecall
from jax_ddpm.evaluation.distances import Score as Score
from jax_ddpm.evaluation.distances import frechet_distance as frechet_distance
from jax_ddpm.evaluation.distances import inception_score as inception_score
from jax_ddpm.evaluation.distances import kernel_distance as kernel_distance
from jax_ddpm.evaluation.distances import nearest_distances as nearest_distances
from jax_ddpm.evaluation.distances import precision_recall as precision_recall
from jax_ddpm.evaluation.features import FeatureNetwork as FeatureNetwork
from jax_ddpm.evaluation.features import Statistics as Statistics
from jax_ddpm.evaluation.features import load_inception as load_inception
from jax_ddpm.evaluation.features import load_statistics as load_statistics
from jax_ddpm.evaluation.features import save_statistics as save_statistics
from jax_ddpm.evaluation.features import statistics as statistics
from jax_ddpm.evaluation.features import train_classifier as train_classifier
