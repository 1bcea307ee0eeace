"""Weights in and out. NumPy and safetensors only: torch is imported for pickles alone."""

from jax_ddpm.interop.diffusers import load_diffusers, save_diffusers
from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.interop.openai import load_openai, load_openai_classifier
from jax_ddpm.interop.torch import (
    layer_kinds,
    layers_from_torch,
    simple_unet_from_torch,
    simple_unet_to_torch,
    unet_from_torch,
    unet_to_torch,
)

__all__ = [
    "load_diffusers", "save_diffusers", "DiffusionModel", "load_openai", "load_openai_classifier",
    "layer_kinds", "layers_from_torch", "simple_unet_from_torch", "simple_unet_to_torch",
    "unet_from_torch", "unet_to_torch",
]  # fmt: skip
