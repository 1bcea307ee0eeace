"""Networks, in Flax Linen. No other room of the library knows Flax."""

from jax_ddpm.models.classifier import NoisyClassifier as NoisyClassifier
from jax_ddpm.models.presets import adm_imagenet64 as adm_imagenet64
from jax_ddpm.models.presets import adm_imagenet128 as adm_imagenet128
from jax_ddpm.models.presets import adm_imagenet256 as adm_imagenet256
from jax_ddpm.models.presets import adm_imagenet512 as adm_imagenet512
from jax_ddpm.models.presets import ddpm_celebahq as ddpm_celebahq
from jax_ddpm.models.presets import ddpm_cifar10 as ddpm_cifar10
from jax_ddpm.models.presets import ddpm_digits as ddpm_digits
from jax_ddpm.models.simple_unet import SimpleUNet as SimpleUNet
from jax_ddpm.models.unet import UNet as UNet
