"""Networks, in Flax Linen. The only place that knows Flax."""

from jax_ddpm.models.simple_unet import SimpleUNet as SimpleUNet

__all__ = ["SimpleUNet"]
