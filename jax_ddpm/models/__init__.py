"""Networks, in Flax Linen. No other room of the library knows Flax."""

from jax_ddpm.models.classifier import NoisyClassifier
from jax_ddpm.models.presets import (
    adm_imagenet64,
    adm_imagenet128,
    adm_imagenet256,
    adm_imagenet512,
    ddpm_celebahq,
    ddpm_cifar10,
    ddpm_digits,
)
from jax_ddpm.models.simple_unet import SimpleUNet
from jax_ddpm.models.unet import UNet

__all__ = [
    "NoisyClassifier", "adm_imagenet64", "adm_imagenet128", "adm_imagenet256", "adm_imagenet512",
    "ddpm_celebahq", "ddpm_cifar10", "ddpm_digits", "SimpleUNet", "UNet",
]  # fmt: skip
