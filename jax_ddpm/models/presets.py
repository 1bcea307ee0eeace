"""Configurations with a name."""

from typing import Any

from jax_ddpm._checks import checked
from jax_ddpm.models.unet import UNet

__all__ = ["ddpm_cifar10", "ddpm_digits"]


def ddpm_cifar10(**fields: Any) -> UNet:
    """Ho et al.'s CIFAR-10 network, 35,746,307 parameters; `fields` replace its own."""
    return UNet(**{"sample_size": 32, **fields})


@checked
def ddpm_digits(num_classes: int | None = 10, **fields: Any) -> UNet:
    """A small network for digits, 8×8 to 32×32; with classes, the last label is the null label."""
    settings: dict[str, Any] = {
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "num_class_embeds": None if num_classes is None else num_classes + 1,
    }
    return UNet(**{**settings, **fields})
