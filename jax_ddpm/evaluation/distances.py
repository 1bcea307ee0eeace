"""How far two sets of images are apart, from their features; on the host, in float64.

    frechet_distance     |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)         Heusel et al. 2017, eq. 6
    kernel_distance      MMD², unbiased, of k(x, y) = (x·y / n + 1)³     Bińkowski et al. 2018, §4
    inception_score      exp(E KL(p(y|x) ‖ p(y)))                        Salimans et al. 2016, §4
    precision_recall     the share of one set that lies in balls around the other's members
                                                                         Kynkäänniemi et al. 2019
    nearest_distances    from each member of one set to the nearest of the other

Each is what torch-fidelity computes of the same features. Of Inception's they are called FID, KID,
and so on; of other features they are other figures.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError, check_positive
from jax_ddpm._typing import AnyArray, Rows

_SEED = 2020
"""torch-fidelity's, of its subsets and its order."""
_ROWS = 1000
"""Distances are computed for so many at a time."""


class KernelDistance(NamedTuple):
    """Over subsets of the two sets."""

    mean: float
    std: float


class Score(NamedTuple):
    """Over parts of the set."""

    mean: float
    std: float


class PrecisionRecall(NamedTuple):
    """Shares, 0 to 1."""

    precision: float
    """Of the generated images, those that are like real ones."""
    recall: float
    """Of the real images, those that generated ones are like."""


def frechet_distance(mu_1: Any, sigma_1: Any, mu_2: Any, sigma_2: Any) -> float:
    """Fréchet distance of two Gaussians, squared (Heusel et al. 2017, eq. 6; Dowson & Landau
    1982). FID, where they are those of Inception's 2,048 features of many images.

    Args:
      mu_1, mu_2: means [feature].
      sigma_1, sigma_2: covariances [feature, feature]; those of fewer samples than features are
        singular, which is fine.

    Raises:
      FieldError: naming what is not finite or does not fit.
    """
    mu_1, sigma_1 = _gaussian("1", mu_1, sigma_1)
    mu_2, sigma_2 = _gaussian("2", mu_2, sigma_2)
    if len(mu_1) != len(mu_2):
        raise FieldError("mu_2", f"expected {len(mu_1)} features, as mu_1, got {len(mu_2)}")
    # The eigenvalues of Σ₁ Σ₂ are those of a symmetric matrix: real and, but for rounding, not
    # negative.
    root = _square_root(sigma_1)
    inner = np.linalg.eigvalsh(root @ sigma_2 @ root)
    trace = np.sqrt(np.maximum(inner, 0)).sum()
    difference = mu_1 - mu_2
    distance = difference @ difference + np.trace(sigma_1) + np.trace(sigma_2) - 2 * trace
    return max(float(distance), 0.0)  # rounding leaves the distance of equals below 0


def kernel_distance(
    x: Rows, y: Rows, *, subsets: int = 100, subset_size: int = 1000
) -> KernelDistance:
    """Squared maximum mean discrepancy under the cubic kernel, without bias (Bińkowski et al.
    2018, §4), over random subsets: its mean and its spread. It may be a little below 0. KID, of
    Inception's features.

    Args:
      x, y: features [sample, feature]; two or more samples each.
      subsets: how many subsets are drawn of each.
      subset_size: samples of a subset, or all of the smaller set if that has fewer.

    Raises:
      FieldError: naming what is not finite or does not fit.
    """
    x, y = _pair("x", x, "y", y)
    check_positive(subsets=subsets)
    size = min(subset_size, len(x), len(y))
    if size < 2:
        raise FieldError("subset_size", f"expected two samples or more, got {size}")
    random = np.random.RandomState(_SEED)  # noqa: NPY002

    def kernel(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        return (one @ other.T / one.shape[1] + 1) ** 3

    distances = []
    for _ in range(subsets):
        of_x = x[random.choice(len(x), size, replace=False)]
        of_y = y[random.choice(len(y), size, replace=False)]
        within = sum(
            kernel(each, each).sum() - (((each**2).mean(1) + 1) ** 3).sum() for each in (of_x, of_y)
        )
        distances.append(within / (size * (size - 1)) - 2 * kernel(of_x, of_y).mean())
    return KernelDistance(float(np.mean(distances)), float(np.std(distances)))


def inception_score(logits: Rows, *, splits: int = 10) -> Score:
    """exp of the mean Kullback-Leibler divergence of p(y | x) from p(y) (Salimans et al. 2016, §4),
    over `splits` parts of the images in random order: its mean and its spread.

    Args:
      logits: [sample, class], of the network's 1,008 classes, without bias.
      splits: how many parts; each has a sample or more.

    Raises:
      FieldError: naming what is not finite or does not fit.
    """
    logits = _finite("logits", logits)
    scores = InceptionScores(len(logits), splits)
    scores.add(logits)
    return scores.score


class InceptionScores:
    """The inception score of `total` images, whose logits come in batches and are not kept."""

    def __init__(self, total: int, splits: int = 10) -> None:
        if not 1 <= splits <= total:
            raise FieldError("splits", f"expected 1 to {total}, the samples, got {splits}")
        order = np.random.RandomState(_SEED).permutation(total)  # noqa: NPY002
        bounds = [part * total // splits for part in range(splits + 1)]
        self._sizes = np.diff(bounds)
        self._part_of = np.empty(total, np.int64)
        self._part_of[order] = np.repeat(np.arange(splits), self._sizes)
        self.seen = 0
        """How many images were added."""
        self._entropy = np.zeros(splits)
        """Sums of p(y | x) log p(y | x)."""
        self._classes: np.ndarray | None = None
        """Sums of p(y | x)."""

    def add(self, logits: np.ndarray) -> None:
        """The next images."""
        logits = np.float64(logits) - np.max(logits, axis=1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        p = np.exp(log_p)
        parts = self._part_of[self.seen : self.seen + len(p)]
        if self._classes is None:
            self._classes = np.zeros((len(self._sizes), p.shape[1]))
        np.add.at(self._classes, parts, p)
        np.add.at(self._entropy, parts, (p * log_p).sum(1))
        self.seen += len(p)

    @property
    def score(self) -> Score:
        """Of all images."""
        assert self._classes is not None and self.seen == len(self._part_of)
        mean = self._classes / self._sizes[:, None]
        log_mean = np.log(mean, out=np.zeros_like(mean), where=mean > 0)
        scores = np.exp(self._entropy / self._sizes - (mean * log_mean).sum(1))
        return Score(float(scores.mean()), float(scores.std()))


def precision_recall(real: Rows, generated: Rows, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2): an image is like those
    of a set if it is no further from one of them than that one's k-th nearest neighbour.

    Args:
      real: features [sample, feature], more than k samples.
      generated: likewise.
      k: which neighbour; 3 is the paper's.

    Raises:
      FieldError: naming what is not finite or does not fit.
    """
    real, generated = _pair("real", real, "generated", generated)
    check_positive(k=k)
    if k >= (fewest := min(len(real), len(generated))):
        raise FieldError("k", f"expected fewer than {fewest}, the samples, got {k}")

    def share_within(points: np.ndarray, centers: np.ndarray) -> float:
        radii = [np.partition(rows, k, axis=1)[:, k] for rows in _distances(centers, centers)]
        radius = np.concatenate(radii)
        within = [(rows <= radius).any(axis=1) for rows in _distances(points, centers)]
        return float(np.concatenate(within).mean())

    return PrecisionRecall(share_within(generated, real), share_within(real, generated))


def nearest_distances(x: Rows, y: Rows | None = None) -> np.ndarray:
    """Euclidean distance of each row of `x` to the nearest of `y`, or without `y` to the nearest
    other row of `x`; float64 [sample].

    Samples that are nearer to the images that were learned than those are to each other are
    copies: the model has memorised.
    """
    x, others = _pair("x", x, "y", x if y is None else y)
    own = int(y is None)
    if len(others) <= own:
        raise FieldError("x", f"expected two samples or more, got {len(x)}")
    nearest = [np.partition(rows, own, axis=1)[:, own] for rows in _distances(x, others)]
    return np.concatenate(nearest)


def _distances(x: np.ndarray, y: np.ndarray) -> Iterator[np.ndarray]:
    """Euclidean distances [some of x, y]. A point's distance to itself is below all others."""
    squares = (y**2).sum(1)
    for first in range(0, len(x), _ROWS):
        rows = x[first : first + _ROWS]
        squared = (rows**2).sum(1)[:, None] - 2 * rows @ y.T + squares
        if x is y:
            squared[np.arange(len(rows)), np.arange(first, first + len(rows))] = 0
        yield np.sqrt(np.maximum(squared, 0))


def _square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T


def _gaussian(which: str, mu: AnyArray, sigma: AnyArray) -> tuple[np.ndarray, np.ndarray]:
    mean, covariance = _finite(f"mu_{which}", mu, 1), _finite(f"sigma_{which}", sigma)
    if covariance.shape != (len(mean), len(mean)):
        expected = f"expected shape {(len(mean), len(mean))}, as mu_{which} has {len(mean)}"
        raise FieldError(f"sigma_{which}", f"{expected} features, got {covariance.shape}")
    scale = np.abs(covariance).max(initial=0)
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-6 * scale:
        raise FieldError(f"sigma_{which}", "expected a symmetric matrix")
    return mean, covariance


def _pair(name: str, x: AnyArray, other: str, y: AnyArray) -> tuple[np.ndarray, np.ndarray]:
    first = _finite(name, x)
    second = first if y is x else _finite(other, y)
    for each, array in ((name, first), (other, second)):
        if not len(array):
            raise FieldError(each, "expected one sample or more, got none")
    if first.shape[1] != second.shape[1]:
        expected = f"expected {first.shape[1]} features, as {name}"
        raise FieldError(other, f"{expected}, got {second.shape[1]}")
    return first, second


def _finite(name: str, values: AnyArray, ndim: int = 2) -> np.ndarray:
    array = np.asarray(values, np.float64)
    if array.ndim != ndim:
        raise FieldError(name, f"expected {ndim} axes, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise FieldError(name, "expected finite numbers, got NaN or infinity")
    return array
