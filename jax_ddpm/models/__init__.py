"""Networks, in Flax Linen. The only place that knows Flax."""

from jax_ddpm.models.classifier import NoisyClassifier as NoisyClassifier
from jax_ddpm.models.presets import adm_imagenet64 as adm_imagenet64
from jax_ddpm.models.presets import adm_imagenet128 as adm_imagenet128
from jax_ddpm.models.presets import adm_imagenet256 as adm_imagenet256
from jax_ddpm.models.presets import adm_imagenet512 as adm_imagenet512
from jax_ddpm.models.presets import ddpm_celebahq as ddpm_celebahq
from jax_ddpm.models.presets import ddpm_cifar10 as ddpm_cifar10
from jax_ddpm.models.presets import ddpm_digits as ddpm_digits
from jax_ddpm.models.shapes import parameter_shapes as parameter_shapes
from jax_ddpm.models.simple_unet import SimpleUNet as SimpleUNet
from jax_ddpm.models.unet import UNet as UNet

__all__ = [
    "NoisyClassifier",
    "SimpleUNet",
    "UNet",
    "adm_imagenet128",
    "adm_imagenet256",
    "adm_imagenet512",
    "adm_imagenet64",
    "ddpm_celebahq",
    "ddpm_cifar10",
    "ddpm_digits",
    "parameter_shapes",
]
