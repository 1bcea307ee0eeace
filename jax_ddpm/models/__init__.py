"""Networks, in Flax Linen. The only place that knows Flax."""

from jax_ddpm.models.presets import adm_imagenet64 as adm_imagenet64
from jax_ddpm.models.presets import ddpm_celebahq as ddpm_celebahq
from jax_ddpm.models.presets import ddpm_cifar10 as ddpm_cifar10
from jax_ddpm.models.presets import ddpm_digits as ddpm_digits
from jax_ddpm.models.simple_unet import SimpleUNet as SimpleUNet
from jax_ddpm.models.unet import UNet as UNet

__all__ = [
    "SimpleUNet",
    "UNet",
    "adm_imagenet64",
    "ddpm_celebahq",
    "ddpm_cifar10",
    "ddpm_digits",
]
