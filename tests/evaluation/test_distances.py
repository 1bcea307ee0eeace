"""Figures from features: torch-fidelity's on the same features, and closed forms.

The figures were computed by torch-fidelity 0.4.0 (its functions `*_to_metric`, with defaults
unless something is said), which imports torchvision and so is no package of these tests.
"""

import numpy as np
import pytest

from jax_ddpm.evaluation import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
    statistics,
)

RANDOM = np.random.default_rng(0)
MIX = RANDOM.standard_normal((32, 32)) / np.sqrt(32)
X = np.maximum(RANDOM.standard_normal((1200, 32)) @ MIX, 0)
FEW = {"subsets": 10, "subset_size": 50}
Y = np.maximum(0.1 + 0.9 * RANDOM.standard_normal((1100, 32)) @ MIX, 0)


def frechet(x, y):
    return frechet_distance(*statistics(x)[1:], *statistics(y)[1:])


def test_frechet_distance_in_closed_form():
    """Of equals 0, also where covariances are singular."""
    for x in (X, X[:30], X[:1], np.random.default_rng(0).standard_normal((30, 512)) ** 2):
        assert 0 <= frechet(x, x) < 1e-3 and 0 <= frechet(x, x[::-1]) < 1e-3
    # Of Gaussians with independent features, Σ (σ₁ - σ₂)² beside the means.
    mu, deviations = np.asarray([1.0, -2.0]), np.asarray([[3.0, 0.5], [1.0, 2.0]])
    one, other = (np.diag(each**2) for each in deviations)
    assert frechet_distance(mu, one, 0 * mu, other) == pytest.approx(5 + 4 + 2.25, rel=1e-12)


@pytest.mark.parametrize(
    ("found", "expected", "rel"),
    [
        (lambda: frechet(X, Y), 0.16267167556366502, 1e-6),
        # Fewer samples than features: singular covariances.
        (lambda: frechet(X[:20], Y[:25]), 6.9414359813226145, 1e-6),
        (lambda: kernel_distance(X, Y), (0.00162388397431378, 0.00044016471015564094), 1e-9),
        (lambda: kernel_distance(X, Y, **FEW), (-0.001975110112102074, 0.012471694974378332), 1e-9),
        (lambda: inception_score(4 * X), (8.450509689583127, 0.3908754216285297), 1e-6),
        (lambda: inception_score(4 * X, splits=3).mean, 8.77598410405962, 1e-6),
        (lambda: precision_recall(Y, X), (0.7833333611488342, 0.8681818246841431), 1e-6),
        (lambda: precision_recall(Y, X, 5), (0.8583333492279053, 0.9272727370262146), 1e-6),
    ],
)
def test_figures_are_torch_fidelitys(found, expected, rel):
    assert found() == pytest.approx(expected, rel=rel)


def test_inception_score_in_closed_form():
    """1 where nothing is told apart, the number of classes where each is certain."""
    logits = np.tile(100 * np.eye(8), (10, 1))
    assert inception_score(0 * logits).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(logits, splits=1).mean == pytest.approx(8, rel=1e-12)


def test_precision_and_recall_of_points_on_a_line():
    """Around 0, 1, 2 and 3 the first neighbour is 1 away; around 2, 2.5 and 9 0.5, 0.5 and 6.5."""
    real, generated = np.arange(4.0)[:, None], np.asarray([[2.0], [2.5], [9.0]])
    found = precision_recall(real, generated, k=1)
    # 9 is not within 1 of a real one; 9 reaches down to 2.5, so 3 is reached, and 2 by 2 itself.
    assert found == pytest.approx((2 / 3, 2 / 4))
    # 4 is 1 away from 3: just within.
    assert precision_recall(real, np.full((2, 1), 4.0), k=1).precision == 1


def test_nearest_distances():
    x = X[:40]
    expected = np.sqrt(((x[:, None] - Y[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(nearest_distances(x, Y), expected, rtol=1e-9)
    apart = np.sqrt(((x[:, None] - x[None]) ** 2).sum(-1)) + 1e9 * np.eye(40)
    np.testing.assert_allclose(nearest_distances(x), apart.min(1), rtol=1e-9)
    copies = np.concatenate([X[:3], Y[:3]])
    assert (nearest_distances(copies, X) < 1e-6).tolist() == [True] * 3 + [False] * 3


def test_what_would_be_silent_is_named():
    _, mu, sigma = statistics(X)
    with pytest.raises(ValueError, match="sigma_2: expected a symmetric matrix"):
        frechet_distance(mu, sigma, mu, np.triu(sigma))
    with pytest.raises(ValueError, match="x: expected finite numbers of 2 axes"):
        kernel_distance(np.where(X > 2, np.nan, X), Y)
    with pytest.raises(ValueError, match="x: expected two samples or more, got 1"):
        nearest_distances(X[:1])
