"""Weights in and out. NumPy and safetensors only: torch is never imported."""

from jax_ddpm.interop.simple_unet import simple_unet_from_torch as simple_unet_from_torch
from jax_ddpm.interop.simple_unet import simple_unet_to_torch as simple_unet_to_torch

__all__ = ["simple_unet_from_torch", "simple_unet_to_torch"]
