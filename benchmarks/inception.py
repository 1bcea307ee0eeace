"""FID's Inception, here and in torch-fidelity (with torchvision; without them only JAX is timed).

256 images of 32×32, in batches of 64, float32 at full precision, with random weights, on JAX's
default backend: images to features on the host. On a CPU it also says how high the memory of a
process rises with 256 images and with 1,024.
"""

import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import jax
import numpy as np
import torch

from benchmarks.contenders import torch_device
from benchmarks.harness import Contender, Row, in_new_process, race, resident_bytes
from jax_ddpm.cpu import use_cores
from jax_ddpm.evaluation import load_inception
from jax_ddpm.evaluation.features import extract, over_devices
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.models.inception import InceptionV3

_NUMBER, _BATCH = 256, 64
_NAMES = ("64", "192", "768", "2048", "logits_unbiased")


def inception(full: bool) -> list[Row]:
    """Features within 1e-5 of one another; a step is an image."""
    with tempfile.TemporaryDirectory() as folder:
        path, weights = f"{folder}/weights.safetensors", _weights()
        save_tensors(path, weights)
        network = load_inception(path)

        def run() -> np.ndarray:
            batches = zip(_batches(_NUMBER))
            return _joined(over_devices(network.apply_fn, network.variables, batches, _BATCH))

        contenders = {"JAX": Contender(run, run)}
        if find_spec("torch_fidelity"):
            contenders["torch-fidelity"] = _torch_fidelity(weights, f"{folder}/weights.pth")
        rows = race(contenders, _BATCH, _NUMBER, tolerance=1e-5, rounds=3)
        for count in (_NUMBER, 4 * _NUMBER) if jax.default_backend() == "cpu" else ():
            peak = in_new_process(_peak, path, count)
            rows.append({"contender": f"JAX, {count:,} images", "bytes": peak})
    return rows


def _batches(number: int) -> Iterator[np.ndarray]:
    images = np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), np.uint8)
    return (images[first : first + _BATCH] for first in range(0, number, _BATCH))


def _weights() -> dict[str, np.ndarray]:
    """Under torch-fidelity's names, such that features stay of the order of 1."""
    random = np.random.default_rng(0)
    shapes: Any = jax.eval_shape(
        InceptionV3().init, jax.random.key(0), np.zeros((1, 32, 32, 3), np.uint8)
    )
    tensors = {}
    for name, layer in shapes["params"].items():
        kernel = np.moveaxis(random.standard_normal(layer["kernel"].shape), (-1, -2), (0, 1))
        kernel *= np.sqrt(2 / np.prod(kernel.shape[1:]))
        ones = np.ones(len(kernel))
        if name == "fc":
            tensors |= {"fc.weight": kernel, "fc.bias": 0 * ones}
            continue
        tensors[f"{name}.conv.weight"] = kernel
        for what, value in {"weight": 1, "bias": 0, "running_mean": 0, "running_var": 1}.items():
            tensors[f"{name}.bn.{what}"] = value * ones
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def _torch_fidelity(weights: dict[str, np.ndarray], path: str) -> Contender:
    tensors = {name: torch.from_numpy(value) for name, value in weights.items()}
    for name in [name for name in tensors if name.endswith("running_var")]:
        tensors[name.replace("running_var", "num_batches_tracked")] = torch.tensor(0)
    torch.save(tensors, path)
    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    device, names = torch_device(), list(_NAMES)
    network: Any = module.FeatureExtractorInceptionV3(
        "inception", names, feature_extractor_weights_path=path
    ).to(device)

    def features(batch: np.ndarray) -> dict[str, np.ndarray]:
        x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(device)
        return dict(zip(_NAMES, (each.cpu().numpy() for each in network(x)), strict=True))

    @torch.inference_mode()
    def run() -> np.ndarray:
        return _joined(map(features, _batches(_NUMBER)))

    return Contender(run, run)


def _joined(features: Iterator[dict[str, np.ndarray]]) -> np.ndarray:
    return np.concatenate([np.hstack([each[name] for name in _NAMES]) for each in features])


def _peak(path: str, number: int) -> int:
    """Bytes that a process reaches when it extracts features."""
    use_cores()
    extract(load_inception(path), _batches(number), number)
    return resident_bytes("VmHWM")
