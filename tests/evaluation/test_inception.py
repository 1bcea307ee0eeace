"""Features of FID's Inception, against torch-fidelity's.

`inception/` holds what torch-fidelity 0.4.0, with the seeded weights below, gave in float64,
rounded to float32: of four images of 32×32, and of what `picture` makes for each other size.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jax_ddpm.evaluation import load_inception
from jax_ddpm.evaluation.features import VARIABLE
from jax_ddpm.io.arrays import save_tensors

HERE = Path(__file__).parent / "inception"
NAMES = ("64", "192", "768", "2048", "logits_unbiased")
ENDS = np.cumsum([64, 192, 768, 2048])
pytestmark = pytest.mark.usefixtures("untyped")


@pytest.fixture(scope="module")
def weights():
    """Arrays under torch-fidelity's names, in the order of its state dict."""
    shapes = json.loads((HERE / "weights.json").read_text())["shapes"]
    random, tensors = np.random.default_rng(7), {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.zeros((), np.int64)
        elif name.endswith("running_var"):
            tensors[name] = np.float32(0.5 + random.random(shape))
        else:
            scale = 0.1 if len(shape) == 1 else np.sqrt(2 / np.prod(shape[1:]))
            values = name.endswith("bn.weight") + random.standard_normal(shape) * scale
            tensors[name] = np.float32(values)
    return tensors


@pytest.fixture(scope="module")
def path(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_tensors(file, weights)
    return file


@pytest.fixture(scope="module")
def network(path):
    return load_inception(path)


def picture(height, width):
    """Sixteen colours and noise, uint8 [1, height, width, 3]."""
    random = np.random.default_rng(1000 * height + width)
    coarse = random.integers(0, 256, (1, 4, 4, 3))
    image = np.kron(coarse, np.ones((1, -(-height // 4), -(-width // 4), 1)))[:, :height, :width]
    return np.clip(image + random.integers(-40, 41, image.shape), 0, 255).astype(np.uint8)


def check(got, expected, tolerance, dtype=np.float32):
    assert sorted(got) == sorted(NAMES)
    for name in NAMES:
        assert got[name].dtype == dtype and got[name].shape == expected[name].shape
        error = np.abs(np.asarray(got[name], np.float64) - expected[name]).max()
        assert error <= tolerance * np.abs(expected[name]).max(), name


def test_features_are_torch_fidelitys(path):
    known = np.load(HERE / "features.npz")
    check(load_inception(path, dtype="float64")(known["images"]), known, 1e-6, np.float64)


SLOW = [pytest.param(size, marks=pytest.mark.slow) for size in ("8x8", "48x64", "299x299")]


@pytest.mark.parametrize("size", [*SLOW, "300x413"])
def test_of_other_sizes_too(network, size):
    """Enlarged, as it is, and made smaller without averaging."""
    parts = np.split(np.load(HERE / "other_sizes.npz")[size][None], ENDS, axis=1)
    known = dict(zip(NAMES, parts, strict=True))
    check(network(picture(*map(int, size.split("x")))), known, 1e-5)


def test_torchs_own_file_is_the_same(weights, network, torch, tmp_path, monkeypatch):
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    torch.save(tensors, tmp_path / "weights.pth")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "weights.pth"))
    other = load_inception()
    jax.tree.map(np.testing.assert_array_equal, network.variables, other.variables)
    assert network.description != other.description  # files with digests of their own


def test_what_is_missing_or_foreign_is_named(weights, tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    published = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(ValueError, match=f"path: expected a file, got none: .*{published}"):
        load_inception()
    file = tmp_path / "x.safetensors"
    for tensors, problem in (
        ({}, "not FID's Inception: .*fc.weight"),
        (weights | {"fc.weight": np.zeros((1000, 2048), np.float32)}, "fc/kernel: expected .*1008"),
    ):
        save_tensors(file, tensors)
        with pytest.raises(ValueError, match=f"x.safetensors .*{problem}"):
            load_inception(file)


def test_other_images_are_refused(network):
    images = np.zeros((1, 32, 32, 3), np.uint8)
    for wrong in (images[0], images.astype(np.float32), images[..., :1]):
        with pytest.raises((TypeError, ValueError), match="images: expected"):
            network(wrong)
