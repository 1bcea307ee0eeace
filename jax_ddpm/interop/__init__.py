"""Weights in and out. NumPy and safetensors only: torch is imported for pickles alone."""

from jax_ddpm.interop.diffusers import load_diffusers as load_diffusers
from jax_ddpm.interop.diffusers import save_diffusers as save_diffusers
from jax_ddpm.interop.model import DiffusionModel as DiffusionModel
from jax_ddpm.interop.openai import load_openai as load_openai
from jax_ddpm.interop.openai import load_openai_classifier as load_openai_classifier
from jax_ddpm.interop.torch import layer_kinds as layer_kinds
from jax_ddpm.interop.torch import layers_from_torch as layers_from_torch
from jax_ddpm.interop.torch import simple_unet_from_torch as simple_unet_from_torch
from jax_ddpm.interop.torch import simple_unet_to_torch as simple_unet_to_torch
from jax_ddpm.interop.torch import unet_from_torch as unet_from_torch
from jax_ddpm.interop.torch import unet_to_torch as unet_to_torch
