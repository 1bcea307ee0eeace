"""How far two sets of images are apart, from their features, in float64, as in torch-fidelity."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax

from jax_ddpm._errors import FieldError, check_floats, check_positive, check_whole, described
from jax_ddpm._typing import Rows
from jax_ddpm.evaluation.features import Extracted

INCEPTION = "2048"
"""The name of the features that FID is of."""
_SEED = 2020  # torch-fidelity's, of its subsets and its order
_MEMORY = 64  # MiB of the distances that are in memory at once


class Score(NamedTuple):
    """A figure over parts, or subsets, of the images."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """The share of generated images that are like real ones, and of real ones like generated."""

    precision: float
    recall: float


def main_figure(main: str) -> str:
    """What the Fréchet distance of these features is called: "fid" of Inception's alone."""
    return "fid" if main == INCEPTION else "classifier_frechet_distance"


def compare(generated: Extracted, real: Extracted, main: str) -> dict[str, Any]:
    """The figures of generated images against real ones, as far as they can be had."""
    figures = {}
    for name in sorted(real.statistics, key=lambda name: name != main):
        called = main_figure(main) if name == main else f"{main_figure(main)}_{name}"
        one, other = generated.statistics[name], real.statistics[name]
        figures[called] = frechet_distance(one.mu, one.sigma, other.mu, other.sigma)
    if generated.logits is not None and len(generated.logits) >= 100:  # ten a part
        score = inception_score(generated.logits)
        figures |= {"inception_score": score.mean, "inception_score_std": score.std}
    fewest = min(len(generated.kept), len(real.kept))
    if fewest > 1:
        # Of few images, smaller subsets, which still differ.
        size = 1000 if fewest >= 1000 else max(2, fewest // 2)
        distance = kernel_distance(real.kept, generated.kept, subset_size=size)
        kernel = "kid" if main == INCEPTION else "classifier_kernel_distance"
        figures |= {kernel: distance.mean, f"{kernel}_std": distance.std}
    if fewest > 3:
        figures |= precision_recall(real.kept, generated.kept, 3)._asdict()
    return figures


def copies(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    """Whether the model has memorised: the median distance of an image to the nearest real one, and
    the share of generated images that are nearer than all but 1 % of real ones to each other."""
    if len(real) < 2:
        return {}
    nearest, apart = nearest_distances(generated, real), nearest_distances(real)
    # Images that are twice in the data say nothing of how near others are.
    differing = apart[apart > 1e-5 * np.median(apart)]
    near = np.quantile(differing, 0.01) if len(differing) else 0.0
    return {
        "nearest": float(np.median(nearest)),
        "nearest_real": float(np.median(apart)),
        "nearer_than_1_percent": float(np.mean(nearest < near)),
    }


def frechet_distance(mu_1: Any, sigma_1: Any, mu_2: Any, sigma_2: Any) -> float:
    """Squared Fréchet distance of two Gaussians, |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½): Heusel et
    al. 2017, eq. 6. FID, for Inception's 2,048 features.

    Args:
      mu_1, mu_2: means, [feature]; `ValueError` if they are not finite, or differ in shape.
      sigma_1, sigma_2: covariances, [feature, feature], finite and symmetric, perhaps singular.

    Examples:
      >>> evaluation.frechet_distance([0, 0], np.eye(2), [3, 4], 4 * np.eye(2))  # 3² + 4² + 2
      27.0
    """
    mu_1, mu_2 = _finite(1, mu_1=mu_1, mu_2=mu_2)
    sigma_1, sigma_2 = _finite(2, sigma_1=sigma_1, sigma_2=sigma_2)
    for name, array in {"mu_2": mu_2, "sigma_1": sigma_1, "sigma_2": sigma_2}.items():
        check_floats(name, array, array.ndim * mu_1.shape)
        if np.abs(array - array.T).max() > 1e-6 * np.abs(array).max():
            raise FieldError(name, "expected a symmetric matrix")
    # The eigenvalues of Σ₁ Σ₂ are those of a symmetric matrix: but for rounding, not negative.
    values, vectors = np.linalg.eigh(sigma_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    inner = np.linalg.eigvalsh(root @ sigma_2 @ root)
    trace = np.sqrt(np.maximum(inner, 0)).sum()
    difference = mu_1 - mu_2
    distance = difference @ difference + np.trace(sigma_1) + np.trace(sigma_2) - 2 * trace
    return max(float(distance), 0.0)  # rounding leaves the distance of equals below 0


def kernel_distance(x: Rows, y: Rows, *, subsets: int = 100, subset_size: int = 1000) -> Score:
    """Unbiased squared MMD of the kernel (x·y / n + 1)³ of n features: Bińkowski et al. 2018, §4.

    Args:
      x, y: finite features, [sample, feature], two samples or more. KID, if they are Inception's.
      subsets, subset_size: number of random subsets and their size, at most the smaller set's.

    Returns:
      `mean`, perhaps a little below 0, and `std` over the subsets.

    Examples:
      >>> evaluation.kernel_distance(np.ones((2, 1)), np.zeros((2, 1)))  # 2³ + 1³ - 2 · 1³
      Score(mean=7.0, std=0.0)
    """
    x, y = _finite(2, x=x, y=y)
    check_positive(subsets=subsets)
    size = min(subset_size, len(x), len(y))
    check_whole("subset_size", size, 2)
    random = np.random.RandomState(_SEED)  # noqa: NPY002

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one @ other.T / one.shape[1] + 1) ** 3

    distances = []
    for _ in range(subsets):
        both = [rows[random.choice(len(rows), size, replace=False)] for rows in (x, y)]
        within = sum(kernel(one, one).sum() - (((one**2).mean(1) + 1) ** 3).sum() for one in both)
        distances.append(within / (size * (size - 1)) - 2 * kernel(*both).mean())
    return Score(float(np.mean(distances)), float(np.std(distances)))


def inception_score(logits: Rows, *, splits: int = 10) -> Score:
    """exp(E KL(p(y | x) ‖ p(y))), the inception score: Salimans et al. 2016, §4.

    Args:
      logits: finite, [sample, class]; of Inception, those without bias ("logits_unbiased").
      splits: number of random parts of the samples, each with a score of its own.

    Returns:
      `mean` and `std` over the parts.

    Examples:
      >>> round(evaluation.inception_score(1000 * np.eye(4), splits=1).mean, 6)  # sure of 4 classes
      4.0
    """
    logits, total = np.asarray(logits), len(logits)
    check_whole("splits", splits, 1, total)
    order = np.random.RandomState(_SEED).permutation(total)  # noqa: NPY002
    scores = []
    for rows in np.split(order, [part * total // splits for part in range(1, splits)]):
        (part,) = _finite(2, logits=logits[rows])
        log_p = log_softmax(part, axis=1)
        p = np.exp(log_p)
        mean = p.mean(0)
        log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        scores.append(np.exp((p * log_p).sum() / len(p) - (mean * log_mean).sum()))
    return Score(float(np.mean(scores)), float(np.std(scores)))


def precision_recall(real: Rows, generated: Rows, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall: Kynkäänniemi et al. 2019, eq. 1 and 2.

    Args:
      real, generated: finite features, [sample, feature], of more than `k` samples each.
      k: the ball around a sample reaches to its k-th neighbour in its own set.

    Returns:
      `precision`, the share of generated samples in a ball of a real one; `recall`, the reverse.

    Examples:
      >>> real, generated = np.array([[0.0], [1], [2], [3]]), np.array([[0.5], [1.5], [2.5], [9]])
      >>> evaluation.precision_recall(real, generated, k=1)
      PrecisionRecall(precision=0.75, recall=1.0)
    """
    real, generated = _finite(2, real=real, generated=generated)
    check_whole("k", k, 1, min(len(real), len(generated)) - 1)

    def share_within(points: np.ndarray, centers: np.ndarray) -> float:
        radius = _of_distances(centers, centers, lambda rows: np.partition(rows, k)[:, k])
        within = _of_distances(points, centers, lambda rows: (rows <= radius).any(axis=1))
        return float(within.mean())

    return PrecisionRecall(share_within(generated, real), share_within(real, generated))


def nearest_distances(x: Rows, y: Rows | None = None) -> np.ndarray:
    """Euclidean distance of each row to its nearest neighbour, float64 [sample].

    Args:
      x: features [sample, feature].
      y: the possible neighbours, [other, feature]. Default: the other rows of `x`.

    Examples:
      >>> evaluation.nearest_distances(np.array([[0.0, 0], [3, 4]]), np.array([[0.0, 1]]))
      array([1.        , 4.24264069])
    """
    (x,) = _finite(2, x=x)
    if y is None and len(x) < 2:
        raise FieldError("x", f"expected two samples or more, got {len(x)}")
    others, k = (x, 1) if y is None else (_finite(2, y=y)[0], 0)
    return _of_distances(x, others, lambda rows: np.partition(rows, k)[:, k])


def _of_distances(x: np.ndarray, y: np.ndarray, reduce: Callable[..., np.ndarray]) -> np.ndarray:
    """`reduce` of Euclidean distances [some of x, y]; of x to itself, the diagonal is exactly 0.
    All round alike, so that what lies on the edge of a ball is within."""
    from sklearn.metrics import pairwise_distances_chunked

    options: Any = {"reduce_func": lambda rows, _: reduce(rows), "working_memory": _MEMORY}
    return np.concatenate([*pairwise_distances_chunked(x, y, **options)])


def _finite(ndim: int, **arrays: Any) -> list[np.ndarray]:
    """As float64. Raises `FieldError` unless all are finite and have so many axes."""
    found = {name: np.asarray(array, np.float64) for name, array in arrays.items()}
    for name, array in found.items():
        if array.ndim != ndim or not array.size or not np.isfinite(array).all():
            got = f"{described(array)}, perhaps with NaN"
            raise FieldError(name, f"expected finite numbers of {ndim} axes, got {got}")
    return [*found.values()]
