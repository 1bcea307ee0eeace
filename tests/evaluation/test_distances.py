"""Figures from features: torch-fidelity's on the same features, closed forms, SciPy.

The figures were computed by torch-fidelity 0.4.0 (`fid_statistics_to_metric`,
`kid_features_to_metric`, `isc_features_to_metric`, `prc_features_to_metric`, with its defaults
unless something is said), which imports torchvision and so is no package of these tests.
"""

import numpy as np
import pytest
import scipy.linalg

from jax_ddpm.evaluation import (
    frechet_distance,
    inception_score,
    kernel_distance,
    nearest_distances,
    precision_recall,
    statistics,
)
from jax_ddpm.evaluation.distances import InceptionScores


def features():
    """1,200 and 1,100 of 32 each."""
    random = np.random.default_rng(0)
    mix = random.standard_normal((32, 32)) / np.sqrt(32)
    x = np.maximum(random.standard_normal((1200, 32)) @ mix, 0)
    y = np.maximum(0.1 + 0.9 * random.standard_normal((1100, 32)) @ mix, 0)
    return x, y


def frechet(x, y):
    one, other = statistics(x), statistics(y)
    return frechet_distance(one.mu, one.sigma, other.mu, other.sigma)


def test_frechet_distance_is_torch_fidelitys():
    x, y = features()
    assert frechet(x, y) == pytest.approx(0.16267167556366502, rel=1e-6)
    # Fewer samples than features: singular covariances.
    assert frechet(x[:20], y[:25]) == pytest.approx(6.9414359813226145, rel=1e-6)


def test_frechet_distance_by_scipys_square_root_and_in_closed_form():
    x, y = features()
    one, other = statistics(x), statistics(y)
    root = scipy.linalg.sqrtm(one.sigma @ other.sigma).real
    expected = np.sum((one.mu - other.mu) ** 2) + np.trace(one.sigma + other.sigma - 2 * root)
    assert frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert frechet(x, x) == pytest.approx(0, abs=1e-9)
    # Of Gaussians with independent features, Σ (σ₁ - σ₂)² beside the means.
    mu, deviations = np.asarray([1.0, -2.0]), np.asarray([[3.0, 0.5], [1.0, 2.0]])
    one, other = (np.diag(each**2) for each in deviations)
    assert frechet_distance(mu, one, 0 * mu, other) == pytest.approx(5 + 4 + 2.25, rel=1e-12)


def test_kernel_distance_is_torch_fidelitys():
    x, y = features()
    distance = kernel_distance(x, y)
    assert distance.mean == pytest.approx(0.00162388397431378, rel=1e-9)
    assert distance.std == pytest.approx(0.00044016471015564094, rel=1e-9)
    distance = kernel_distance(x, y, subsets=10, subset_size=50)
    assert distance.mean == pytest.approx(-0.001975110112102074, rel=1e-9)
    assert distance.std == pytest.approx(0.012471694974378332, rel=1e-9)


def test_kernel_distance_of_all_samples_by_its_definition():
    """Sums over pairs, Bińkowski et al. 2018, eq. 4, each pair by itself."""
    x, y = features()[0][:5], features()[1][:5]

    def kernel(one, other):
        return (np.dot(one, other) / 32 + 1) ** 3

    within = [
        np.mean([kernel(a, b) for i, a in enumerate(each) for j, b in enumerate(each) if i != j])
        for each in (x, y)
    ]
    between = np.mean([kernel(a, b) for a in x for b in y])
    assert kernel_distance(x, y).mean == pytest.approx(sum(within) - 2 * between, rel=1e-9)


def test_inception_score_is_torch_fidelitys():
    x, _ = features()
    score = inception_score(4 * x)
    assert score.mean == pytest.approx(8.450509689583127, rel=1e-6)
    assert score.std == pytest.approx(0.3908754216285297, rel=1e-6)
    score = inception_score(4 * x, splits=3)
    assert score.mean == pytest.approx(8.77598410405962, rel=1e-6)


def test_inception_score_in_closed_form_and_in_batches():
    """1 where nothing is told apart, the number of classes where each is certain."""
    logits = np.tile(100 * np.eye(8), (10, 1))
    assert inception_score(0 * logits).mean == pytest.approx(1, rel=1e-12)
    assert inception_score(logits, splits=1).mean == pytest.approx(8, rel=1e-12)
    x, _ = features()
    scores = InceptionScores(len(x), splits=10)
    for first in range(0, len(x), 77):
        scores.add(x[first : first + 77].astype(np.float32))
    whole = inception_score(x.astype(np.float32))
    assert scores.score == pytest.approx(whole, rel=1e-12)


def test_precision_and_recall_are_torch_fidelitys():
    x, y = features()
    expected = {3: (0.7833333611488342, 0.8681818246841431)}
    expected[5] = (0.8583333492279053, 0.9272727370262146)
    for k, figures in expected.items():
        assert precision_recall(y, x, k) == pytest.approx(figures, rel=1e-6)
    assert precision_recall(y, x) == precision_recall(y, x, k=3)


def test_precision_and_recall_of_points_on_a_line():
    """Around 0, 1, 2 and 3 the first neighbour is 1 away; around 2, 2.5 and 9 0.5, 0.5 and 6.5."""
    real, generated = np.arange(4.0)[:, None], np.asarray([[2.0], [2.5], [9.0]])
    found = precision_recall(real, generated, k=1)
    # 9 is not within 1 of a real one; 9 reaches down to 2.5, so 3 is reached, and 2 by 2 itself.
    assert found == pytest.approx((2 / 3, 2 / 4))


def test_nearest_distances():
    x, y = features()
    expected = np.sqrt(((x[:40, None] - y[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(nearest_distances(x[:40], y), expected, rtol=1e-9)
    apart = np.sqrt(((x[:40, None] - x[None, :40]) ** 2).sum(-1)) + 1e9 * np.eye(40)
    np.testing.assert_allclose(nearest_distances(x[:40]), apart.min(1), rtol=1e-9)
    copies = np.concatenate([x[:3], y[:3]])
    assert (nearest_distances(copies, x) < 1e-6).tolist() == [True] * 3 + [False] * 3


@pytest.mark.usefixtures("untyped")
def test_what_does_not_fit_is_named():
    x, y = features()
    one = statistics(x)
    wrong = x.copy()
    wrong[3, 4] = np.nan
    with pytest.raises(ValueError, match="x: expected finite numbers"):
        kernel_distance(wrong, y)
    with pytest.raises(ValueError, match="generated: expected 32 features, as real, got 31"):
        precision_recall(x, y[:, 1:])
    with pytest.raises(ValueError, match="k: expected fewer than 3, the samples, got 3"):
        precision_recall(x[:3], y)
    with pytest.raises(ValueError, match="splits: expected 1 to 4, the samples, got 10"):
        inception_score(x[:4])
    with pytest.raises(ValueError, match="mu_2: expected 32 features, as mu_1, got 31"):
        frechet_distance(one.mu, one.sigma, one.mu[1:], one.sigma[1:, 1:])
    with pytest.raises(ValueError, match="sigma_2: expected a symmetric matrix"):
        frechet_distance(one.mu, one.sigma, one.mu, np.triu(one.sigma))
    with pytest.raises(ValueError, match="sigma_1: expected shape"):
        frechet_distance(one.mu, one.sigma[:3], one.mu, one.sigma)
    with pytest.raises(ValueError, match="mu_1: expected"):
        frechet_distance(x, one.sigma, one.mu, one.sigma)
