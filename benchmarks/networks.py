"""The networks that are compared, on both sides with the same weights.

`specs` are those of the accelerator, whose JAX side computes in several arithmetics.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks.harness import available, on_gpu
from jax_ddpm.interop.diffusers import unet_config
from jax_ddpm.interop.torch import unet_from_torch
from jax_ddpm.models import ddpm_cifar10
from torch_reference.models.simple_unet import SimpleUNet

__all__ = [
    "CIFAR10",
    "TUTORIAL",
    "ArithmeticName",
    "Network",
    "Spec",
    "autocast",
    "memory_format",
    "set_torch_precision",
    "specs",
    "torch_device",
    "unet",
]

ArithmeticName = Literal["float32", "TF32", "bfloat16"]

_FIELDS: dict[ArithmeticName, dict[str, Any]] = {
    "float32": {"precision": "highest"},
    "TF32": {},
    "bfloat16": {"dtype": jnp.bfloat16},
}
"""What JAX's network computes in; torch's, as `autocast` and `set_torch_precision` say."""


def torch_device() -> torch.device:
    """Where torch computes: beside JAX, if it can."""
    return torch.device("cuda" if on_gpu() and torch.cuda.is_available() else "cpu")


def memory_format(channels_last: bool) -> torch.memory_format:
    """torch's name of a layout."""
    return torch.channels_last if channels_last else torch.contiguous_format


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
    return module.to(memory_format=memory_format(channels_last))  # pyright: ignore


TUTORIAL = Network(
    "tutorial",
    (64, 64, 3),
    ddpm.SimpleUNet(precision="highest").apply,
    lambda: ddpm.interop.simple_unet_from_torch(_tutorial().cpu().state_dict()),
    _tutorial,
    lambda module, x, t: module(x, t),
    large=False,
)


def unet(name: str, image_shape: tuple[int, int, int], model: ddpm.UNet) -> Network:
    """`model` beside diffusers' network of the same configuration."""

    def module(channels_last: bool = False) -> Any:
        # Here and not above, so that what needs no diffusers runs without it.
        from diffusers.models.unets.unet_2d import UNet2DModel

        torch.manual_seed(42)
        module: Any = UNet2DModel(**unet_config(model))
        return module.to(torch_device()).to(memory_format=memory_format(channels_last))

    return Network(
        name,
        image_shape,
        model.apply,
        lambda: unet_from_torch(module().cpu().state_dict(), model),
        module,
        lambda module, x, t: module(x, t).sample,
        large=True,
    )


CIFAR10 = unet("ddpm_cifar10", (32, 32, 3), ddpm_cifar10(precision="highest"))


class Spec(NamedTuple):
    """A network, whatever it computes in.

    `chain` is how many of the reverse chain's last steps a timed loop takes: each costs the same.
    """

    network: Network
    model: Any
    chain: int
    learning_rate: float
    needs: str | None = None
    """The package that torch's side comes from, beside torch."""

    @property
    def torch_missing(self) -> str | None:
        """Why torch's side cannot be built or cannot be here, if so."""
        backend = jax.default_backend()
        if backend == "gpu" and not torch.cuda.is_available():
            return "torch has no CUDA here"
        if backend not in ("gpu", "cpu"):
            return f"torch has no {backend} here"
        if self.needs and not available(self.needs):
            return f"needs {self.needs}"
        return None

    def computing_in(self, arithmetic: ArithmeticName) -> Network:
        """Both sides, JAX's in `arithmetic`."""
        variables = self.network.variables
        if self.needs and self.torch_missing:  # Flax's weights, since the time is the same
            variables = partial(_initial_variables, self.model)
        apply_fn = self.model.clone(**_FIELDS[arithmetic]).apply
        return self.network._replace(apply_fn=apply_fn, variables=variables)


@cache
def _initial_variables(model: ddpm.UNet) -> Any:
    size = 2 ** (len(model.block_out_channels) - 1)
    x, t = np.zeros((1, size, size, model.in_channels), np.float32), np.zeros(1, np.int32)
    return jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), x, t))


def specs(*, tiny: bool) -> dict[str, Spec]:
    """By the name that the command line takes."""
    tutorial, name, shape = TUTORIAL._replace(name="SimpleUNet"), "ddpm_cifar10", (32, 32, 3)
    # The rates are small because Adam turns rounding into steps: on an H200 at 1e-3, two of
    # torch's layouts were 4e-4 apart in the third loss of 128 images in float32.
    model, chains, rate = ddpm.ddpm_cifar10(), (20, 4), 1e-4
    if tiny:
        name, shape, chains, rate = "small UNet", (8, 8, 3), (3, 2), 1e-3
        tutorial = tutorial._replace(image_shape=shape)
        model = ddpm.UNet(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
            norm_num_groups=4,
        )
    large = unet(name, shape, model)
    large = large._replace(variables=cache(large.variables))
    return {
        "tutorial": Spec(tutorial, ddpm.SimpleUNet(), chains[0], rate),
        "ddpm_cifar10": Spec(large, model, chains[1], 1e-5, "diffusers"),
    }


def set_torch_precision(arithmetic: ArithmeticName) -> None:
    """TF32 where it is asked for and nowhere else; cuDNN tries its algorithms, as XLA does."""
    allowed = arithmetic == "TF32"
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    torch.backends.cudnn.benchmark = True


def autocast(arithmetic: ArithmeticName, function: Callable) -> Callable:
    """`function` under torch's own mixed precision, where `arithmetic` is bfloat16."""
    if arithmetic != "bfloat16":
        return function

    # Asked here, since torch.compile would trace the question too.
    device = torch_device().type

    def cast(*arguments: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return function(*arguments)

    return cast
