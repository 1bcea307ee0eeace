"""Inception with seeded weights, as `inception/` was made with."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_ddpm.io.arrays import save_tensors

HERE = Path(__file__).parent / "inception"


@pytest.fixture(scope="session")
def weights():
    """Arrays under torch-fidelity's names, in the order of its state dict."""
    shapes = json.loads((HERE / "weights.json").read_text())["shapes"]
    random, tensors = np.random.default_rng(7), {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            tensors[name] = np.zeros((), np.int64)
            continue
        if name.endswith("running_var"):
            values = 0.5 + random.random(shape)
        elif name.endswith("bn.weight"):
            values = 1 + 0.1 * random.standard_normal(shape)
        elif len(shape) == 1:
            values = 0.1 * random.standard_normal(shape)
        else:
            values = random.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
        tensors[name] = values.astype(np.float32)
    return tensors


@pytest.fixture(scope="session")
def path(weights, tmp_path_factory):
    file = tmp_path_factory.mktemp("inception") / "weights.safetensors"
    save_tensors(file, weights)
    return file
