"""Features of FID's Inception, against torch-fidelity's.

`inception/` holds features that torch-fidelity's network, with the seeded weights of conftest.py,
gave in float64, rounded to float32: `features.npz` of four images of 32×32, and `other_sizes.npz`
(torch-fidelity 0.4.0) of the image that `picture` makes for each size.
"""

from pathlib import Path

import jax
import numpy as np
import pytest

from jax_ddpm.evaluation import load_inception
from jax_ddpm.evaluation.inception import VARIABLE
from jax_ddpm.io.arrays import save_tensors

HERE = Path(__file__).parent / "inception"
NAMES = ("64", "192", "768", "2048", "logits_unbiased")
pytestmark = pytest.mark.usefixtures("untyped")


def picture(height, width):
    """Sixteen colours and noise, uint8 [1, height, width, 3]."""
    random = np.random.default_rng(1000 * height + width)
    coarse = random.integers(0, 256, (1, 4, 4, 3))
    image = np.kron(coarse, np.ones((1, -(-height // 4), -(-width // 4), 1)))[:, :height, :width]
    return np.clip(image + random.integers(-40, 41, image.shape), 0, 255).astype(np.uint8)


def check(got, expected, tolerance, dtype=np.float32):
    assert tuple(sorted(got)) == tuple(sorted(NAMES))
    for name in NAMES:
        assert got[name].dtype == dtype and got[name].shape == expected[name].shape
        error = np.abs(np.asarray(got[name], np.float64) - expected[name]).max()
        assert error <= tolerance * np.abs(expected[name]).max(), name


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-6)])
def test_features_are_torch_fidelitys(path, dtype, tolerance):
    known = np.load(HERE / "features.npz")
    network = load_inception(path, dtype=dtype)
    check(network(known["images"]), known, tolerance, dtype)


@pytest.mark.parametrize("size", ["8x8", "48x64", "299x299", "300x413"])
def test_of_other_sizes_too(path, size):
    """Enlarged, as it is, and made smaller without averaging."""
    flat = np.load(HERE / "other_sizes.npz")[size]
    ends = np.cumsum([64, 192, 768, 2048, 1008])
    known = {
        name: values[None] for name, values in zip(NAMES, np.split(flat, ends[:-1]), strict=True)
    }
    check(load_inception(path)(picture(*map(int, size.split("x")))), known, 1e-5)


def test_torchs_own_file_is_the_same(weights, path, torch, tmp_path, monkeypatch):
    tensors = {name: torch.from_numpy(np.array(value)) for name, value in weights.items()}
    torch.save(tensors, tmp_path / "weights.pth")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "weights.pth"))
    one, other = load_inception(path), load_inception()
    jax.tree.map(np.testing.assert_array_equal, one.variables, other.variables)
    assert one.description != other.description  # files with digests of their own


def test_what_is_missing_or_foreign_is_named(weights, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    published = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError, match=f"path: expected a file, got none: .*{published}"):
        load_inception()
    with pytest.raises(ValueError, match=f"path: no such file: .*nowhere.*{published}"):
        load_inception(tmp_path / "nowhere.pth")
    file = tmp_path / "x.safetensors"
    save_tensors(file, {name: value for name, value in weights.items() if name != "fc.bias"})
    with pytest.raises(
        ValueError,
        match="x.safetensors is not FID's Inception: expected a tensor fc.bias, got none",
    ):
        load_inception(file)
    save_tensors(file, {**weights, "AuxLogits.fc.bias": np.zeros(1000, np.float32)})
    with pytest.raises(ValueError, match="only Inception's tensors, got AuxLogits.fc.bias"):
        load_inception(file)
    file.write_bytes(b"no weights")
    with pytest.raises(ValueError, match="expected a safetensors file, got a damaged one"):
        load_inception(file)


def test_other_images_are_refused(path):
    network = load_inception(path)
    with pytest.raises(ValueError, match="images: expected"):
        network(np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(TypeError, match="images: expected"):
        network(np.zeros((1, 32, 32, 3), np.float32))
    with pytest.raises(ValueError, match="images: expected 3 channels, got 1"):
        network(np.zeros((1, 32, 32, 1), np.uint8))
