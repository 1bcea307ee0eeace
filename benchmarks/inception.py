"""FID's Inception, here and in torch-fidelity: `python -m benchmarks.inception`.

256 images of 32×32, in batches of 64, float32 at full precision, with random weights, on JAX's
default backend: images to features on the host. Features are compared first, then both sides take
turns. On a CPU it also says how high the memory of a process rises with 256 images and with 1,024.

It needs torch, torchvision and torch-fidelity; without them only JAX is timed.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.harness import (
    available,
    check_agreement,
    cores,
    describe,
    interleave,
    on_gpu,
    resident_bytes,
    summary,
)
from jax_ddpm.cpu import use_cores
from jax_ddpm.evaluation import load_inception
from jax_ddpm.evaluation.features import over_devices
from jax_ddpm.evaluation.statistics import extract
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.models.inception import InceptionV3

__all__ = ["main"]

_NUMBER, _BATCH, _ROUNDS = 256, 64, 3
_NAMES = ("64", "192", "768", "2048", "logits_unbiased")


def main(argv: list[str] | None = None) -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.inception",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--number", type=int, default=_NUMBER, help="images (default: %(default)s)")
    parser.add_argument("--extract", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    use_cores()
    if arguments.extract:
        path, number = arguments.extract
        extract(load_inception(path), _batches(_images(int(number))), int(number))
        print(json.dumps(resident_bytes("VmHWM") / 2**20))
        return
    number = arguments.number
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        save_tensors(path, _weights())
        images = _images(number)
        network = load_inception(path)
        runs: dict[str, Callable[[], Any]] = {"jax_ddpm": lambda: _ours(network, images)}
        if available("torch_fidelity"):
            theirs = _torch_fidelity(path)
            runs["torch-fidelity"] = lambda: theirs(images)
        outputs = {name: run() for name, run in runs.items()}
        differences = check_agreement(outputs, "jax_ddpm", 1e-5)
        times = interleave(runs, _ROUNDS)
        machine = describe()
        print(
            f"{jax.devices()[0].device_kind}, {cores()} cores, {machine['versions']}; "
            f"{number} images, differences {differences}; median (lowest to highest)"
        )
        for name, seconds in times.items():
            middle, low, high = summary(seconds)
            print(
                f"{name}: {middle:.2f} s ({low:.2f} to {high:.2f}), {number / middle:,.1f} a second"
            )
        if len(times) > 1:
            pairs = zip(times["torch-fidelity"], times["jax_ddpm"], strict=True)
            middle, low, high = summary([other / one for other, one in pairs])
            print(f"torch-fidelity takes {middle:.2f} times as long ({low:.2f} to {high:.2f})")
        if jax.default_backend() == "cpu":
            for count in (number, 4 * number):
                print(f"memory with {count} images: {_peak(path, count):,.0f} MiB")


def _images(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (number, 32, 32, 3), np.uint8)


def _batches(images: np.ndarray) -> Iterator[np.ndarray]:
    return (images[first : first + _BATCH] for first in range(0, len(images), _BATCH))


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
        if name == "fc":
            tensors |= {"fc.weight": kernel, "fc.bias": np.zeros(len(kernel))}
            continue
        tensors[f"{name}.conv.weight"] = kernel
        ones = np.ones(len(kernel))
        for what, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            tensors[f"{name}.bn.{what}"] = value * ones
    return {name: value.astype(np.float32) for name, value in tensors.items()}


def _ours(network: Any, images: np.ndarray) -> np.ndarray:
    return _joined(over_devices(network.apply_fn, network.variables, zip(_batches(images)), _BATCH))


def _torch_fidelity(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import torch
    from safetensors.torch import load_file

    module = import_module("torch_fidelity.feature_extractor_inceptionv3")
    torch.set_num_threads(cores())
    torch.backends.cudnn.allow_tf32 = False
    file = path.with_suffix(".pth")
    tensors = load_file(path)
    counts = {
        name.replace("running_var", "num_batches_tracked"): torch.tensor(0)
        for name in tensors
        if name.endswith("running_var")
    }
    torch.save(tensors | counts, file)
    network = module.FeatureExtractorInceptionV3(
        "inception", list(_NAMES), feature_extractor_weights_path=str(file)
    )
    device = "cuda" if on_gpu() else "cpu"
    network = network.to(device)

    @torch.inference_mode()
    def run(images: np.ndarray) -> np.ndarray:
        def features(batch: np.ndarray) -> dict[str, np.ndarray]:
            x = torch.from_numpy(np.ascontiguousarray(batch.transpose(0, 3, 1, 2))).to(device)
            return dict(zip(_NAMES, (each.cpu().numpy() for each in network(x)), strict=True))

        return _joined(map(features, _batches(images)))

    return run


def _joined(features: Iterator[dict[str, np.ndarray]]) -> np.ndarray:
    rows = [np.concatenate([each[name] for name in _NAMES], axis=1) for each in features]
    return np.concatenate(rows)


def _peak(path: Path, number: int) -> float:
    command = [sys.executable, "-m", "benchmarks.inception", "--extract", str(path), str(number)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
