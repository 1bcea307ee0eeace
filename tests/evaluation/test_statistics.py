"""Mean and covariance in one pass, and in files."""

import numpy as np
import pytest

from jax_ddpm.evaluation import load_statistics, save_statistics, statistics


@pytest.mark.parametrize("sizes", [(10, 10, 10), (1, 28, 1), (1, 1, 1, 27)])
def test_parts_join_to_the_whole(sizes):
    """NumPy's, over all at once, although the mean is a million deviations away."""
    rows = 1e6 + np.random.default_rng(0).standard_normal((30, 5))
    parts = np.split(rows, np.cumsum(sizes)[:-1])
    found = statistics(parts[0])
    for part in parts[1:]:
        found = found.joined(statistics(part))
    assert found.num == 30
    np.testing.assert_allclose(found.mu, rows.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.sigma, np.cov(rows, rowvar=False), rtol=1e-8, atol=1e-9)


def test_files_go_both_ways(tmp_path):
    """As pytorch-fid reads them, `np.load(path)["mu"]`, and as it writes them."""
    found = statistics(np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32))
    save_statistics(tmp_path / "ours.npz", found)
    with np.load(tmp_path / "ours.npz") as content:
        mu, sigma = content["mu"][:], content["sigma"][:]
    np.savez_compressed(tmp_path / "theirs.npz", mu=mu, sigma=sigma)
    for name, num in (("ours.npz", 9), ("theirs.npz", 0)):
        back = load_statistics(tmp_path / name)
        assert back.num == num
        np.testing.assert_array_equal(back.mu, found.mu)
        np.testing.assert_array_equal(back.sigma, found.sigma)


def test_other_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.npz: no such file"):
        load_statistics(tmp_path / "nowhere.npz")
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    with pytest.raises(ValueError, match=r"x.npz: expected arrays mu and sigma"):
        load_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", mu=np.zeros(3), sigma=np.zeros((3, 2)))
    with pytest.raises(ValueError, match=r"expected mu \[feature\] and sigma"):
        load_statistics(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", mu=np.full(3, np.nan), sigma=np.zeros((3, 3)))
    with pytest.raises(ValueError, match="expected finite numbers"):
        load_statistics(tmp_path / "x.npz")


@pytest.mark.usefixtures("untyped")
def test_images_that_were_not_counted_are_not_joined(tmp_path):
    found = statistics(np.random.default_rng(0).standard_normal((9, 4)))
    np.savez(tmp_path / "theirs.npz", mu=found.mu, sigma=found.sigma)
    with pytest.raises(ValueError, match="num: expected the number of images of both, got 0"):
        load_statistics(tmp_path / "theirs.npz").joined(found)
    with pytest.raises(ValueError, match="features: expected one sample or more, got none"):
        statistics(np.zeros((0, 4)))
    np.savez(tmp_path / "x.npz", mu=found.mu, sigma=np.triu(found.sigma))
    with pytest.raises(ValueError, match="x.npz: expected a symmetric sigma"):
        load_statistics(tmp_path / "x.npz")
