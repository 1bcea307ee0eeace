"""Layers of a diffusion U-Net, and `Block`, all layers of one resolution.

Names and arithmetic are those of diffusers' `UNet2DModel`, so its weights fit; arrays are NHWC.
The last layer of each residual branch starts at zero, as in Ho et al.'s code: a new network is
nearly the identity.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jax_ddpm._errors import check_shape
from jax_ddpm._typing import Image, Time
from jax_ddpm.cpu.conv import conv_general_dilated
from jax_ddpm.models.attention import dot_product_attention

Features = Float[Array, "batch _ _ _"]
"""NHWC; the size changes from layer to layer."""

Embedding = Float[Array, "batch embedding"]

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": nn.silu,
    "swish": nn.silu,
    "mish": jax.nn.mish,
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
}


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """Settings that all blocks of a network share, and the layers made from them."""

    norm_num_groups: int = 32
    attention_groups: int | None = None
    """Groups of the norms before attention; None for `norm_num_groups`, 0 for no norm."""
    norm_eps: int | float = 1e-5
    act_fn: str = "silu"
    dropout: int | float = 0.0
    resnet_time_scale_shift: str = "default"
    output_scale_factor: int | float = 1
    downsample_padding: int = 1
    deterministic: bool = True
    remat: bool = False
    dtype: Any
    param_dtype: Any
    precision: Any

    @classmethod
    def of(cls, network: nn.Module, **others: Any) -> "BlockConfig":
        """The settings among the fields of `network`, and `others`."""
        names = [each.name for each in fields(cls) if hasattr(network, each.name)]
        return cls(**{name: getattr(network, name) for name in names}, **others)

    def conv(self, features: int, name: str, size: int = 3, **options: Any) -> nn.Conv:
        options = {"padding": size // 2, "conv_general_dilated": conv_general_dilated, **options}
        return nn.Conv(features, (size, size), name=name, **self._policy(), **options)

    def dense(self, features: int, name: str, **options: Any) -> nn.Dense:
        return nn.Dense(features, name=name, **self._policy(), **options)

    def norm(self, name: str, num_groups: int | None = None) -> nn.GroupNorm:
        # The fast variance, E[x²] - E[x]², cancels where the mean is large.
        norm = partial(nn.GroupNorm, use_fast_variance=False, epsilon=self.norm_eps, name=name)
        groups = num_groups or self.norm_num_groups
        return norm(groups, dtype=self.dtype, param_dtype=self.param_dtype)

    def layer(self, kind: type[nn.Module], *options: Any, name: str) -> nn.Module:
        return (nn.remat(kind) if self.remat else kind)(self, *options, name=name)

    def attend(self, queries: Array, others: Array, head_dim: int) -> Array:
        """Heads [batch, queries, heads, head_dim], of attention to all `others`."""
        (batch, _, channels), sources = others.shape, (queries, others, others)
        heads = (channels // head_dim, head_dim)
        query, key, value = (
            self.dense(math.prod(heads), name)(each).reshape(batch, -1, *heads)
            for name, each in zip(("to_q", "to_k", "to_v"), sources, strict=True)
        )
        return dot_product_attention(query, key, value, precision=self.precision)

    def act(self, x: Array) -> Array:
        return ACTIVATIONS[self.act_fn](x)

    def _policy(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("dtype", "param_dtype", "precision")}


class TimeEmbedding(nn.Module):
    """Two dense layers over `waves` sinusoids of `scale` · t (Vaswani et al. 2017).

    Attributes:
      flip_sin_to_cos: whether cosines come before sines.
      freq_shift: 1 makes the last frequency exactly 1e-4; 0 stops just above it.
    """

    config: BlockConfig
    waves: int
    features: int
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    scale: int | float = 1

    @nn.compact
    def __call__(self, t: Time, x: Image) -> Embedding:
        time, half = each_time(t, x), self.waves // 2
        frequencies = np.exp(-np.log(10_000) * np.arange(half) / (half - self.freq_shift))
        angles = time * jnp.asarray(self.scale * frequencies, time.dtype)[None, :]
        pair = [jnp.sin(angles), jnp.cos(angles)]
        hidden = jnp.concatenate(pair[::-1] if self.flip_sin_to_cos else pair, axis=-1)
        hidden = jnp.pad(hidden, ((0, 0), (0, self.waves % 2)))
        hidden = hidden.astype(self.config.dtype or hidden.dtype)
        hidden = nn.silu(self.config.dense(self.features, "linear_1")(hidden))
        return self.config.dense(self.features, "linear_2")(hidden)


def each_time(t: Time, x: Image) -> Array:
    """The step number of each image, [batch, 1]; `t` is a number or [batch]."""
    check_shape("t", t, (), jnp.shape(x)[:1])
    # bfloat16 cannot tell 999 from 1,000.
    t = jnp.asarray(t, np.promote_types(x.dtype, np.float32))
    return jnp.broadcast_to(t, jnp.shape(x)[:1])[:, None]


class ResnetBlock(nn.Module):
    """Two convolutions; the time embedding is added, or scales and shifts, between them.

    `resample`, `halve` or `double`, changes the size of both branches (Brock et al. 2019).
    """

    config: BlockConfig
    features: int
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
        norm = config.norm("norm2")
        if scale_shift:
            scale, shift = jnp.split(time, 2, axis=-1)
            hidden = norm(hidden) * (1 + scale) + shift
        else:
            hidden = norm(hidden + time)
        hidden = nn.Dropout(config.dropout, deterministic=config.deterministic)(config.act(hidden))
        hidden = config.conv(self.features, "conv2", kernel_init=nn.initializers.zeros)(hidden)
        if x.shape[-1] != self.features:
            x = config.conv(self.features, "conv_shortcut", size=1)(x)
        return (x + hidden) / config.output_scale_factor


class Attention(nn.Module):
    """Self-attention over all pixels; channels that do not fill a head are left out."""

    config: BlockConfig
    head_dim: int

    @nn.compact
    def __call__(self, x: Features) -> Features:
        config, (batch, height, width, channels), hidden = self.config, x.shape, x
        if config.attention_groups != 0:
            hidden = config.norm("group_norm", config.attention_groups)(hidden)
        hidden = hidden.reshape(batch, height * width, channels)
        mixed = config.attend(hidden, hidden, self.head_dim)
        # Meshes with Explicit axes can only reshape one axis at a time.
        mixed = mixed.reshape(batch, height * width, -1).reshape(batch, height, width, -1)
        hidden = config.dense(channels, "to_out_0", kernel_init=nn.initializers.zeros)(mixed)
        return (x + hidden) / config.output_scale_factor


class Resample(nn.Module):
    """Nearest-neighbour upsampling and a convolution, or a convolution of stride 2."""

    config: BlockConfig
    upward: bool

    @nn.compact
    def __call__(self, x: Features) -> Features:
        if self.upward:
            return self.config.conv(x.shape[-1], "conv")(double(x))
        edges = (self.config.downsample_padding, 1)  # 0 pads only the last row and column
        return self.config.conv(x.shape[-1], "conv", strides=2, padding=(edges, edges))(x)


def halve(x: Features) -> Features:
    """Average pooling over 2×2 pixels."""
    batch, height, width, channels = x.shape
    rows = x.reshape(batch, height // 2, 2, width, channels)  # one axis at a time, as above
    return rows.reshape(batch, height // 2, 2, width // 2, 2, channels).mean((2, 4))


def double(x: Features) -> Features:
    """Nearest-neighbour upsampling by 2."""
    return x.repeat(2, axis=1).repeat(2, axis=2)


class Level(NamedTuple):
    """A block of the network: one resolution on the way down or up, or the middle."""

    name: str
    features: int
    resnets: int
    attentions: int
    """The first this many residual blocks are followed by attention."""
    head_dim: int
    """Channels of an attention head."""
    resample: str | None
    """How the block changes the size at its end, `"conv"` or `"resnet"`; None for not at all."""


class Block(nn.Module):
    """The residual blocks of a level, with attention after the first of them, then resampling."""

    config: BlockConfig
    level: Level

    @nn.compact
    def __call__(
        self, x: Features, embedding: Embedding, skips: Sequence[Features] = ()
    ) -> list[Features]:
        """The output of every layer. On the way up, each residual block also sees a skip."""
        config, level, upward = self.config, self.level, len(skips) > 0
        states = []
        for number in range(level.resnets):
            if upward:
                x = jnp.concatenate([x, skips[number]], axis=-1)
            x = config.layer(ResnetBlock, level.features, name=f"resnets_{number}")(x, embedding)
            if number < level.attentions:
                x = config.layer(Attention, level.head_dim, name=f"attentions_{number}")(x)
            states.append(x)
        name, resample = ("upsamplers_0", double) if upward else ("downsamplers_0", halve)
        if level.resample == "resnet":
            layer = config.layer(ResnetBlock, level.features, resample, name=name)
            states.append(layer(x, embedding))
        elif level.resample == "conv":
            states.append(Resample(config, upward, name=name)(x))
        return states


def way_down(config: BlockConfig, x: Array, embedding: Array, down: list[Level]) -> list[Array]:
    """The output of `conv_in` and of every layer after it, the lowest resolution last."""
    states = [config.conv(down[0].features, "conv_in")(x)]
    for level in down:
        states += Block(config, level, name=level.name)(states[-1], embedding)
    return states
