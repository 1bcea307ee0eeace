"""What a diffusion U-Net is made of: residual blocks that see the time, attention, resampling.

Names and arithmetic are those of diffusers' `UNet2DModel`, so that its weights fit; arrays are
NHWC. Layers that end a residual branch start at zero, as Ho et al.'s do: a new network begins as
nearly the identity.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_ddpm._errors import FieldError
from jax_ddpm._typing import Image, Time
from jax_ddpm.cpu import conv_general_dilated
from jax_ddpm.models.attention import dot_product_attention

Features = Float[Array, "batch _ _ _"]
"""NHWC, of a size that changes on the way."""

Embedding = Float[Array, "batch embedding"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
}

_ZEROS = nn.initializers.zeros_init()


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """What all blocks of one network share, and the layers that follow from it."""

    norm_num_groups: int
    norm_eps: int | float
    act_fn: str
    dropout: int | float
    resnet_time_scale_shift: str
    attention_head_dim: int | None
    num_attention_heads: int | None
    deterministic: bool
    dtype: Any
    param_dtype: Any
    precision: Any

    def conv(self, features: int, name: str, size: int = 3, **options: Any) -> nn.Conv:
        options = {
            "padding": size // 2,
            "conv_general_dilated": conv_general_dilated,
            **options,
        }
        return nn.Conv(features, (size, size), name=name, **self._policy(), **options)

    def dense(self, features: int, name: str, **options: Any) -> nn.Dense:
        return nn.Dense(features, name=name, **self._policy(), **options)

    def norm(self, name: str, num_groups: int | None = None) -> nn.GroupNorm:
        # The fast variance, E[x²] - E[x]², loses what the parity tests look for.
        return nn.GroupNorm(
            num_groups or self.norm_num_groups,
            epsilon=self.norm_eps,
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name=name,
        )

    def act(self, x: Array) -> Array:
        return ACTIVATIONS[self.act_fn](x)

    def heads(self, channels: int) -> tuple[int, int]:
        """The number of attention heads over `channels`, and the channels of each."""
        head_dim = self.attention_head_dim or channels
        heads = self.num_attention_heads or channels // head_dim
        return heads, channels // heads if self.num_attention_heads else head_dim

    def _policy(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "precision": self.precision,
        }


def embed_time(
    config: BlockConfig,
    t: Time,
    x: Image,
    *,
    waves: int,
    features: int,
    flip_sin_to_cos: bool,
    freq_shift: int,
    scale: int | float = 1,
) -> Embedding:
    """`time_embedding`: two dense layers over `waves` sinusoids of t × `scale`; [batch, features].

    sin and cos have frequencies from 1 to 1e-4 (Vaswani et al. 2017). Cosines come first with
    `flip_sin_to_cos`; the last frequency is reached with `freq_shift` 1. `x` are the images.
    """
    time = each_time(t, x)
    half = waves // 2
    frequencies = np.exp(-np.log(10_000) * np.arange(half) / (half - freq_shift))
    angles = time * jnp.asarray(scale * frequencies, time.dtype)[None, :]
    pair = [jnp.sin(angles), jnp.cos(angles)]
    hidden = jnp.concatenate(pair[::-1] if flip_sin_to_cos else pair, axis=-1)
    hidden = jnp.pad(hidden, ((0, 0), (0, waves % 2)))
    if config.dtype is not None:
        hidden = hidden.astype(config.dtype)
    return TimestepEmbedding(config, features, name="time_embedding")(hidden)


def each_time(t: Time, x: Image) -> Array:
    """The step number of each sample, [batch, 1], from one of each or one for all."""
    if jnp.shape(t) not in ((), jnp.shape(x)[:1]):
        raise FieldError("t", f"expected shape () or {jnp.shape(x)[:1]}, got {jnp.shape(t)}")
    # Sixteen bits have no room for steps near 1,000.
    t = jnp.asarray(t, np.promote_types(x.dtype, np.float32))
    return jnp.broadcast_to(t, jnp.shape(x)[:1])[:, None]


class TimestepEmbedding(nn.Module):
    """Two dense layers."""

    config: BlockConfig
    features: int

    @nn.compact
    def __call__(self, waves: Embedding) -> Array:
        hidden = nn.silu(self.config.dense(self.features, "linear_1")(waves))
        return self.config.dense(self.features, "linear_2")(hidden)


class ResnetBlock(nn.Module):
    """Two convolutions with the time added, or scaling and shifting, between them.

    `resample`, `halve` or `double`, changes the size on both branches (Brock et al. 2019).
    """

    config: BlockConfig
    features: int
    output_scale_factor: int | float = 1
    resample: Callable[[Features], Features] | None = None

    @nn.compact
    def __call__(self, x: Features, embedding: Embedding) -> Features:
        config = self.config
        hidden = config.act(config.norm("norm1")(x))
        if self.resample is not None:
            x, hidden = self.resample(x), self.resample(hidden)
        hidden = config.conv(self.features, "conv1")(hidden)
        scale_shift = config.resnet_time_scale_shift == "scale_shift"
        projection = config.dense(self.features * (1 + scale_shift), "time_emb_proj")
        time = projection(config.act(embedding))[:, None, None, :]
        if scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            hidden = config.norm("norm2")(hidden) * (1 + scale) + shift
        else:
            hidden = config.norm("norm2")(hidden + time)
        hidden = nn.Dropout(config.dropout, deterministic=config.deterministic)(config.act(hidden))
        hidden = config.conv(self.features, "conv2", kernel_init=_ZEROS)(hidden)
        if x.shape[-1] != self.features:
            x = config.conv(self.features, "conv_shortcut", size=1)(x)
        return (x + hidden) / self.output_scale_factor


class Attention(nn.Module):
    """Self-attention over all pixels; `norm_num_groups` None means no normalisation before it."""

    config: BlockConfig
    norm_num_groups: int | None
    output_scale_factor: int | float = 1

    @nn.compact
    def __call__(self, x: Features) -> Features:
        config, (batch, height, width, channels) = self.config, x.shape
        heads, head_dim = config.heads(channels)
        hidden = x
        if self.norm_num_groups is not None:
            hidden = config.norm("group_norm", self.norm_num_groups)(hidden)
        hidden = hidden.reshape(batch, height * width, channels)
        query, key, value = (
            config.dense(heads * head_dim, name)(hidden).reshape(batch, -1, heads, head_dim)
            for name in ("to_q", "to_k", "to_v")
        )
        mixed = dot_product_attention(query, key, value, precision=config.precision)
        # One axis at a time: a mesh of Explicit axes knows no other reshape.
        mixed = mixed.reshape(batch, height * width, -1).reshape(batch, height, width, -1)
        hidden = config.dense(channels, "to_out_0", kernel_init=_ZEROS)(mixed)
        return (x + hidden) / self.output_scale_factor


class Downsample(nn.Module):
    """A convolution of stride 2. `padding` 0 pads one row below and one column to the right."""

    config: BlockConfig
    padding: int

    @nn.compact
    def __call__(self, x: Features) -> Features:
        padding = (0, 1) if self.padding == 0 else (1, 1)
        conv = self.config.conv(x.shape[-1], "conv", strides=2, padding=(padding, padding))
        return conv(x)


class Upsample(nn.Module):
    """Every pixel four times, then a convolution."""

    config: BlockConfig

    @nn.compact
    def __call__(self, x: Features) -> Features:
        return self.config.conv(x.shape[-1], "conv")(double(x))


def halve(x: Features) -> Features:
    """The mean of every 2×2 pixels."""
    batch, height, width, channels = x.shape
    rows = x.reshape(batch, height // 2, 2, width, channels)  # one axis at a time, as above
    return rows.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def double(x: Features) -> Features:
    """Every pixel four times."""
    return x.repeat(2, axis=1).repeat(2, axis=2)
