"""The two sides, set up alike: the names of the contenders, their weights, their devices."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks.compare import check_agreement
from benchmarks.machine import on_gpu
from benchmarks.timing import interleave
from jax_ddpm.interop.diffusers import unet_config
from jax_ddpm.interop.unet import unet_from_torch
from jax_ddpm.models import ddpm_cifar10
from jax_ddpm.training import TrainState
from jax_ddpm.training.sharding import data_sharding, device_mesh
from torch_reference.models.simple_unet import SimpleUNet

__all__ = [
    "CIFAR10",
    "JAX_PLAIN",
    "JAX_SHARDED",
    "REFERENCE",
    "TUTORIAL",
    "JaxTrainer",
    "Network",
    "Race",
    "draw",
    "jax_contenders",
    "jax_loop",
    "nchw",
    "nhwc",
    "synchronize",
    "torch_contenders",
    "torch_device",
    "whole",
]

JAX_PLAIN = "JAX jit"
JAX_SHARDED = "JAX jit, sharded over cores"
REFERENCE = "torch eager"
_LAYOUTS = {REFERENCE: False, "torch eager, channels_last": True}
_COMPILED = {"torch.compile": False, "torch.compile, channels_last": True}


class Network(NamedTuple):
    """One network on both sides, with the same weights."""

    name: str
    image_shape: tuple[int, int, int]
    apply_fn: Callable[..., Any]
    variables: Callable[[], Any]
    torch_module: Callable[[bool], Any]
    """`channels_last -> module`, with the same weights at every call."""
    torch_output: Callable[[Any, Tensor, Tensor], Tensor]
    """`(module, x, t) -> output`"""
    large: bool


def _tutorial(channels_last: bool = False) -> SimpleUNet:
    torch.manual_seed(42)
    module = SimpleUNet().to(torch_device())
    return module.to(memory_format=_memory_format(channels_last))  # pyright: ignore


def _cifar10(channels_last: bool = False) -> Any:
    # Here and not above, so that what needs no diffusers runs without it.
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(42)
    module: Any = UNet2DModel(**unet_config(_UNET))
    return module.to(torch_device()).to(memory_format=_memory_format(channels_last))


_UNET = ddpm_cifar10(precision="highest")
TUTORIAL = Network(
    "tutorial",
    (64, 64, 3),
    ddpm.SimpleUNet(precision="highest").apply,
    lambda: ddpm.interop.simple_unet_from_torch(_tutorial().cpu().state_dict()),
    _tutorial,
    lambda module, x, t: module(x, t),
    large=False,
)
CIFAR10 = Network(
    "ddpm_cifar10",
    (32, 32, 3),
    _UNET.apply,
    lambda: unet_from_torch(_cifar10().cpu().state_dict(), _UNET),
    _cifar10,
    lambda module, x, t: module(x, t).sample,
    large=True,
)


def jax_loop(
    key: jax.Array,
    network: Network,
    schedule: ddpm.NoiseSchedule,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    **policy: Any,
) -> Callable[[], jax.Array]:
    """JAX's reverse loop of the whole `schedule`, compiled."""

    @jax.jit
    def loop(key, variables):
        denoise_fn = partial(network.apply_fn, variables)
        return ddpm.p_sample_loop(key, schedule, denoise_fn, shape, sharding=sharding, **policy)

    arguments = jax.device_put((key, network.variables()), whole(sharding))
    program = loop.lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


class JaxTrainer:
    """A training step, `per_dispatch` of them in a scan, compiled with its state donated."""

    def __init__(
        self,
        step: Callable,
        state: TrainState,
        images: Any,
        sharding: NamedSharding | None,
        per_dispatch: int = 1,
    ) -> None:
        self.images = jax.device_put(images, sharding or whole(None))
        # A copy, since it is donated.
        self.state = jax.device_put(jax.tree.map(jax.numpy.copy, state), whole(sharding))
        self.per_dispatch = per_dispatch

        @partial(jax.jit, donate_argnums=0)
        def steps(state, images):
            return lax.scan(lambda state, _: step(state, images), state, length=per_dispatch)

        self.program = steps.lower(self.state, self.images).compile()

    def run(self, steps: int) -> list[float]:
        """Train for a multiple of `per_dispatch` steps, waiting for the losses of each dispatch."""
        losses = []
        for _ in range(steps // self.per_dispatch):
            self.state, metrics = self.program(self.state, self.images)
            jax.block_until_ready(self.state)
            losses += np.asarray(metrics["loss"]).tolist()
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


def jax_contenders(batch: int) -> dict[str, NamedSharding | None]:
    """Plain, and with the batch over as many CPU devices as divide it, if that is more than one."""
    contenders: dict[str, NamedSharding | None] = {JAX_PLAIN: None}
    mesh = device_mesh(batch)
    if mesh.size > 1 and not on_gpu():
        contenders[JAX_SHARDED] = data_sharding(mesh)
    return contenders


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


class Race:
    """Contenders of one piece of work: first compared with torch eager, then timed in turns."""

    def __init__(self, title: str, tolerance: float, log: Callable[[str], None]) -> None:
        self._title, self._tolerance, self._log = title, tolerance, log
        self._runs: dict[str, Callable[[], object]] = {}
        self._outputs: dict[str, np.ndarray] = {}
        self._facts: dict[str, dict[str, Any]] = {}

    def enter(
        self,
        name: str,
        run: Callable[[], object],
        output: np.ndarray,
        first: float,
        sharding: NamedSharding | None = None,
    ) -> None:
        """`output` is what is compared, `first` the seconds of what includes compilation."""
        self._runs[name], self._outputs[name] = run, output
        compiles = name.startswith(("JAX", "torch.compile"))
        self._facts[name] = {
            "devices": 1 if sharding is None else sharding.mesh.size,
            "compile_s": first if compiles else None,
        }

    def run(self, batch: int, steps: int, rounds: int) -> list[dict[str, Any]]:
        """A row for each contender, whose runs take `steps` steps; may raise `Disagreement`."""
        differences = check_agreement(self._outputs, REFERENCE, self._tolerance)
        self._log(f"{self._title}: the same to {max(differences.values()):.1e}; timing …")
        times = interleave(self._runs, rounds)
        return [
            {
                "contender": name,
                "batch": batch,
                "steps": steps,
                "max_relative_difference": differences.get(name),
                **self._facts[name],
                "seconds_per_step": [seconds / steps for seconds in times[name]],
            }
            for name in self._runs
        ]


def whole(sharding: NamedSharding | None) -> Any:
    """Where weights live beside a batch under `sharding`."""
    if sharding is None:
        return jax.devices()[0]
    return NamedSharding(sharding.mesh, PartitionSpec())


def _memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format
