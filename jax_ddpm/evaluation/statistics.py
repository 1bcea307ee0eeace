"""Mean and covariance of features, gathered in one pass: memory does not grow with the images.

Two sets are joined by their means and their sums of squares about them, so nothing large cancels
(Chan, Golub & LeVeque 1983, eq. 2.1). On the host, in float64.
"""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm._typing import Rows
from jax_ddpm.io.files import replacing


class Statistics(NamedTuple):
    """Of the features of some images."""

    num: int
    """How many images; 0 where a file does not say."""
    mu: np.ndarray
    """Their mean, float64 [feature]."""
    sigma: np.ndarray
    """Their covariance, float64 [feature, feature], over num - 1."""

    def joined(self, other: "Statistics") -> "Statistics":
        """Those of both sets together. Raises `FieldError` if the images of one are not counted."""
        if not (self.num and other.num):
            raise FieldError("num", "expected the number of images of both, got 0")
        count = self.num + other.num
        shift = other.mu - self.mu
        squares = self.sigma * (self.num - 1) + other.sigma * (other.num - 1)
        squares += np.outer(shift, shift) * (self.num * other.num / count)
        return Statistics(count, self.mu + shift * (other.num / count), squares / (count - 1))


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

    Raises `ValueError` naming the file, and what is missing or has another form.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as content:
            mu, sigma = (np.asarray(content[name], np.float64) for name in ("mu", "sigma"))
            count = int(content["num"]) if "num" in content else 0
    except KeyError:
        raise ValueError(f"{path}: expected arrays mu and sigma, got others") from None
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}: expected a .npz of mu and sigma: {reason}") from None
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        expected = "expected mu [feature] and sigma [feature, feature]"
        raise ValueError(f"{path}: {expected}, got {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: expected finite numbers, got NaN or infinity")
    if not np.allclose(sigma, sigma.T, rtol=0, atol=1e-6 * np.abs(sigma).max(initial=0)):
        raise ValueError(f"{path}: expected a symmetric sigma, got another")
    return Statistics(count, mu, sigma)
