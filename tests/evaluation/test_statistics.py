"""Mean and covariance in one pass, and in files."""

from functools import reduce

import numpy as np
import pytest

from jax_ddpm.evaluation import Statistics, load_statistics, save_statistics, statistics

FEATURES = np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)


@pytest.mark.parametrize("sizes", [(10, 10, 10), (1, 28, 1), (1, 1, 1, 27)])
def test_parts_join_to_the_whole(sizes):
    """NumPy's, over all at once, although the mean is a million deviations away."""
    rows = 1e6 + np.random.default_rng(0).standard_normal((30, 5))
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    found = reduce(Statistics.joined, map(statistics, parts))
    assert found.num == 30
    np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-9)


@pytest.mark.usefixtures("untyped")
def test_files_go_both_ways(tmp_path):
    """As pytorch-fid reads them, `np.load(path)["mu"]`, and as it writes them."""
    found = statistics(FEATURES)
    save_statistics(tmp_path / "ours.npz", found)
    with np.load(tmp_path / "ours.npz") as content:
        np.savez_compressed(tmp_path / "theirs.npz", mu=content["mu"], sigma=content["sigma"])
    for name, num in (("ours.npz", 9), ("theirs.npz", 0)):
        back = load_statistics(tmp_path / name)
        assert back.num == num
        np.testing.assert_array_equal(back.mu, found.mu)
        np.testing.assert_array_equal(back.sigma, found.sigma)
    # How many images theirs are of nobody knows.
    with pytest.raises(ValueError, match="num: expected the number of images of both, got 0"):
        back.joined(found)


@pytest.mark.usefixtures("untyped")
def test_what_does_not_fit_is_named(tmp_path):
    with pytest.raises(ValueError, match="features: expected one row or more"):
        statistics(FEATURES[:0])
    mu, sigma = np.zeros(3), np.eye(3)
    shapes = "finite mu .* and symmetric sigma"
    for arrays, problem in (
        ({"images": mu}, "a .npz of arrays mu and sigma"),
        ({"mu": mu, "sigma": sigma[:2]}, shapes),
        ({"mu": 1.0, "sigma": 2.0}, shapes),
        ({"mu": mu * np.nan, "sigma": sigma}, shapes),
        ({"mu": mu, "sigma": np.triu(sigma + 1)}, shapes),
    ):
        np.savez(tmp_path / "x.npz", **arrays)
        with pytest.raises(ValueError, match=f"x.npz: expected {problem}"):
            load_statistics(tmp_path / "x.npz")
