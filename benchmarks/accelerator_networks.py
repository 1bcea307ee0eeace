"""The networks that the accelerator is timed on, each on both sides with the same weights."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.accelerator_rows import available
from jax_ddpm.interop import unet_from_torch
from jax_ddpm.interop.diffusers import unet_config

__all__ = ["ArithmeticName", "Spec", "autocast", "network", "set_torch_precision", "specs"]

ArithmeticName = Literal["float32", "TF32", "bfloat16"]


class Spec(NamedTuple):
    """A network, whatever it computes in.

    `chain` is how many of the reverse chain's last steps a timed loop takes: each costs the same.
    """

    name: str
    model: Any
    image_shape: tuple[int, int, int]
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


def specs(*, tiny: bool) -> dict[str, Spec]:
    """By the name that the command line takes."""
    if tiny:
        small = ddpm.UNet(
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            mid_block_type=None,
            layers_per_block=1,
            norm_num_groups=4,
        )
        shape = (8, 8, 3)
        return {
            "tutorial": Spec("SimpleUNet", ddpm.SimpleUNet(), shape, 3, 1e-3),
            "ddpm_cifar10": Spec("small UNet", small, shape, 2, 1e-5, "diffusers"),
        }
    return {
        # The rates are small because Adam turns rounding into steps: on an H200 at 1e-3, two of
        # torch's layouts were 4e-4 apart in the third loss of 128 images in float32.
        "tutorial": Spec("SimpleUNet", ddpm.SimpleUNet(), (64, 64, 3), 20, 1e-4),
        "ddpm_cifar10": Spec(
            "ddpm_cifar10", ddpm.ddpm_cifar10(), (32, 32, 3), 4, 1e-5, "diffusers"
        ),
    }


def network(spec: Spec, arithmetic: ArithmeticName) -> sides.Network:
    """Both sides of `spec`; JAX's computes in `arithmetic`, torch's as `autocast` and
    `set_torch_precision` say."""
    fields: dict[ArithmeticName, dict[str, Any]] = {
        "float32": {"precision": "highest"},
        "TF32": {},
        "bfloat16": {"dtype": jnp.bfloat16},
    }
    apply_fn = spec.model.clone(**fields[arithmetic]).apply
    if isinstance(spec.model, ddpm.SimpleUNet):
        return sides.TUTORIAL._replace(image_shape=spec.image_shape, apply_fn=apply_fn)
    return sides.Network(
        spec.name,
        spec.image_shape,
        apply_fn,
        partial(_unet_variables, spec.model, spec.torch_missing),
        partial(_torch_unet, spec.model),
        lambda module, x, t: module(x, t).sample,
        large=True,
    )


@cache
def _unet_variables(model: ddpm.UNet, torch_missing: str | None) -> Any:
    """torch's random weights; where there is no torch side, Flax's, since the time is the same."""
    if torch_missing is None:
        return unet_from_torch(_torch_unet(model, False).cpu().state_dict(), model)
    size = 2 ** (len(model.block_out_channels) - 1)
    x, t = np.zeros((1, size, size, model.in_channels), np.float32), np.zeros(1, np.int32)
    return jax.tree.map(np.asarray, jax.jit(model.init)(jax.random.key(0), x, t))


def _torch_unet(model: ddpm.UNet, channels_last: bool) -> Any:
    from diffusers.models.unets.unet_2d import UNet2DModel

    torch.manual_seed(42)
    module: Any = UNet2DModel(**unet_config(model))
    module = module.to(sides.torch_device())
    return module.to(memory_format=torch.channels_last) if channels_last else module


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
    device = sides.torch_device().type

    def cast(*arguments: Any) -> Any:
        with torch.autocast(device, dtype=torch.bfloat16):
            return function(*arguments)

    return cast
