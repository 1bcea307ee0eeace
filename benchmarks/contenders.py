"""The two sides, set up alike: the names of the contenders, their weights, their devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks.machine import on_gpu
from jax_ddpm.interop.diffusers import unet_config
from jax_ddpm.interop.unet import unet_from_torch
from jax_ddpm.models import ddpm_cifar10
from jax_ddpm.training import TrainState
from torch_reference.models.simple_unet import SimpleUNet

__all__ = [
    "JAX_PLAIN",
    "JAX_SHARDED",
    "REFERENCE",
    "JaxTrainer",
    "apply_fn",
    "cifar10_jax",
    "cifar10_torch",
    "data_sharding",
    "devices_of",
    "draw",
    "jax_variables",
    "nchw",
    "nhwc",
    "rows",
    "synchronize",
    "torch_contenders",
    "torch_device",
    "torch_network",
]

JAX_PLAIN = "JAX jit"
JAX_SHARDED = "JAX jit, sharded over cores"
REFERENCE = "torch eager"
_LAYOUTS = {REFERENCE: False, "torch eager, channels_last": True}
_COMPILED = {"torch.compile": False, "torch.compile, channels_last": True}

_model = ddpm.SimpleUNet(precision="highest")


def apply_fn(variables: Any, x: jax.Array, t: jax.Array) -> jax.Array:
    """JAX's network."""
    return _model.apply(variables, x, t)  # pyright: ignore


def torch_network(channels_last: bool = False) -> SimpleUNet:
    """torch's network, with the same weights at every call."""
    torch.manual_seed(42)
    network = SimpleUNet().to(torch_device())
    return network.to(memory_format=_memory_format(channels_last))  # pyright: ignore


def jax_variables() -> dict[str, Any]:
    """JAX's copy of the weights of `torch_network()`."""
    return ddpm.interop.simple_unet_from_torch(torch_network().cpu().state_dict())


def cifar10_torch(channels_last: bool = False) -> Any:
    """diffusers' network of Ho et al.'s CIFAR-10 model, with the same weights at every call."""
    torch.manual_seed(42)
    network: Any = UNet2DModel(**unet_config(ddpm_cifar10()))
    return network.to(torch_device()).to(memory_format=_memory_format(channels_last))


def cifar10_jax() -> tuple[Any, dict[str, Any]]:
    """JAX's network and copy of those weights."""
    model = ddpm_cifar10(precision="highest")
    weights: Any = cifar10_torch().cpu()
    return model, unet_from_torch(weights.state_dict(), model)


class JaxTrainer:
    """A training step, compiled with its state donated, and its state."""

    def __init__(
        self, step: Callable, state: TrainState, images: Any, sharding: NamedSharding | None
    ) -> None:
        place: Any = jax.devices()[0]
        whole = place if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())
        self.images = jax.device_put(images, place if sharding is None else sharding)
        # A copy, since it is donated.
        self.state = jax.device_put(jax.tree.map(jax.numpy.copy, state), whole)
        jitted = jax.jit(step, donate_argnums=0)
        self.program = jitted.lower(self.state, self.images).compile()

    def run(self, steps: int) -> list[float]:
        """Train, waiting for each step's loss."""
        losses = []
        for _ in range(steps):
            self.state, metrics = self.program(self.state, self.images)
            jax.block_until_ready(self.state)
            losses.append(float(metrics["loss"]))
        return losses


def torch_contenders(*, large: bool = False) -> dict[str, tuple[bool, Callable]]:
    """Each torch contender: whether it is channels_last, and what wraps its functions.

    A `large` network is compiled in one layout only, since that takes a minute.
    """
    # One program for each batch size: torch would turn to symbolic shapes at the second, and
    # past its limit of recompilations to eager, without a word.
    torch.compiler.reset()

    def compiled(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False)

    contenders: dict[str, tuple[bool, Callable]] = {
        name: (channels_last, lambda function: function) for name, channels_last in _LAYOUTS.items()
    }
    layouts = {name: last for name, last in _COMPILED.items() if last or not large}
    return contenders | {name: (last, compiled) for name, last in layouts.items()}


def data_sharding(batch: int) -> NamedSharding | None:
    """The batch over as many CPU devices as divide it; None if that is one, or on a GPU."""
    devices = math.gcd(batch, jax.device_count())
    if on_gpu() or devices == 1:
        return None
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec("data"))


def devices_of(sharding: NamedSharding | None) -> int:
    """Over how many devices the batch is split."""
    return 1 if sharding is None else sharding.mesh.size


def torch_device() -> torch.device:
    """Where torch computes: beside JAX, if it can."""
    return torch.device("cuda" if on_gpu() and torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    """Wait for torch."""
    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def draw(batch: int, size: int, channels_last: bool) -> Tensor:
    """Standard normal noise, [batch, 3, size, size], in the layout asked for."""
    if channels_last:
        # Filled in memory order: drawing into a channels_last tensor is slow in torch.
        return torch.randn(batch, size, size, 3, device=torch_device()).permute(0, 3, 1, 2)
    return torch.randn(batch, 3, size, size, device=torch_device())


def nchw(images: Any, channels_last: bool = False) -> Tensor:
    """JAX's images for torch."""
    tensor = torch.from_numpy(np.array(images)).to(torch_device()).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=_memory_format(channels_last))


def nhwc(images: Tensor) -> np.ndarray:
    """torch's images for JAX."""
    return images.detach().cpu().permute(0, 2, 3, 1).numpy()


def rows(
    batch: int,
    steps: int,
    times: dict[str, list[float]],
    devices: dict[str, int],
    differences: dict[str, float],
    compile_s: dict[str, float | None],
) -> list[dict[str, Any]]:
    """What is recorded of each contender: `times` are of whole runs, of `steps` steps each."""
    return [
        {
            "contender": name,
            "batch": batch,
            "steps": steps,
            "devices": devices[name],
            "max_relative_difference": differences.get(name),
            "compile_s": compile_s[name],
            "seconds_per_step": [seconds / steps for seconds in whole],
        }
        for name, whole in times.items()
    ]


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
