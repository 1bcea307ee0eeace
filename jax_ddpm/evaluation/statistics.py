"""Features of many images, gathered in one pass: their mean and covariance, and some of the rows.

Memory grows by the logits alone.
"""

import os
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm._typing import Rows
from jax_ddpm.evaluation.features import LOGITS, FeatureNetwork, over_devices
from jax_ddpm.io.files import replacing

KEPT = 10_000  # images whose features themselves are kept, to compare image with image
_BATCH = 64


class Statistics(NamedTuple):
    """Of the features of some images."""

    num: int
    """How many images; 0 where a file does not say."""
    mu: np.ndarray
    """Their mean, float64 [feature]."""
    sigma: np.ndarray
    """Their covariance, float64 [feature, feature], over num - 1."""

    def joined(self, other: "Statistics") -> "Statistics":
        """Those of both sets together (Chan, Golub & LeVeque 1983, eq. 2.1): nothing large cancels,
        as it would in sums of squares about 0."""
        if not (self.num and other.num):
            raise FieldError("num", "expected the number of images of both, got 0")
        count = self.num + other.num
        shift = other.mu - self.mu
        squares = self.sigma * (self.num - 1) + other.sigma * (other.num - 1)
        squares += np.outer(shift, shift) * (self.num * other.num / count)
        return Statistics(count, self.mu + shift * (other.num / count), squares / (count - 1))


class Extracted(NamedTuple):
    """What is kept of the features of a set of images."""

    statistics: dict[str, Statistics]
    """Of all images, by the names of the features."""
    kept: np.ndarray
    """The main features of the first images, at most `KEPT`: float32 [image, feature]."""
    logits: np.ndarray | None = None
    """Of all images, if the network has them: [image, class]."""

    def joined(self, other: "Extracted") -> "Extracted":
        """Of both sets together, without logits."""
        both = {name: each.joined(other.statistics[name]) for name, each in self.statistics.items()}
        return Extracted(both, np.concatenate([self.kept, other.kept])[:KEPT])


def extract(network: FeatureNetwork, batches: Iterable[np.ndarray], most: int) -> Extracted:
    """Features of the first `most` images, uint8 in batches of any size, all of which are read."""
    gathered: dict[str, Statistics] = {}
    kept, logits = [], []
    images = chain.from_iterable(batches)
    first = islice(images, most)
    groups = iter(lambda: list(islice(first, _BATCH)), [])
    stacked = ((np.stack(group),) for group in groups)
    for features in over_devices(network.apply_fn, network.variables, stacked, _BATCH):
        if LOGITS in features:
            logits.append(features.pop(LOGITS))
        if sum(map(len, kept)) < KEPT:
            kept.append(features[network.main].astype(np.float32))
        for name, rows in features.items():
            here = statistics(rows)
            gathered[name] = gathered[name].joined(here) if name in gathered else here
    for _ in images:  # a draw keeps the others too
        pass
    of_all = np.concatenate(logits) if logits else None
    return Extracted(gathered, np.concatenate(kept)[:KEPT], of_all)


def statistics(features: Rows) -> Statistics:
    """Mean and covariance of features [sample, feature]; one sample has a covariance of 0."""
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2 or not len(rows):
        raise FieldError("features", f"expected one row or more [sample, n], got {rows.shape}")
    mu = rows.mean(0)
    centered = rows - mu
    return Statistics(len(rows), mu, centered.T @ centered / max(len(rows) - 1, 1))


def save_statistics(path: str | os.PathLike[str], found: Statistics) -> None:
    """Write `mu` and `sigma` as pytorch-fid does, a .npz, and `num`. Raises `OSError`."""
    with replacing(Path(path)) as file:
        np.savez_compressed(file, mu=found.mu, sigma=found.sigma, num=found.num)


def load_statistics(path: str | os.PathLike[str]) -> Statistics:
    """Read `mu` and `sigma` from a .npz of `save_statistics`, pytorch-fid or guided-diffusion.
    Raises `ValueError` naming the file."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as content:
            mu, sigma = (np.asarray(content[name], np.float64) for name in ("mu", "sigma"))
            count = int(content["num"]) if "num" in content else 0
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a .npz of arrays mu and sigma: {reason}") from None
    finite = np.isfinite(mu).all() and np.isfinite(sigma).all()
    if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not finite:
        raise ValueError(f"{path}: expected finite mu [feature] and sigma [feature, feature]")
    if np.abs(sigma - sigma.T).max(initial=0) > 1e-6 * np.abs(sigma).max(initial=0):
        raise ValueError(f"{path}: expected a symmetric sigma")
    return Statistics(count, mu, sigma)
