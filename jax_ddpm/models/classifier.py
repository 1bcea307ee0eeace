"""Classifiers: of noisy images, to guide samples, and of clean images, to compare features.

`NoisyClassifier` is that of Dhariwal & Nichol 2021, §4; its way down is that of `UNet`:

    x ─ conv_in ─ down_blocks ─ mid_block ─ pool ─▶ logits of the classes
    t ─ sinusoids ─ time_embedding ─▶ every residual block
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm._errors import check_floats
from jax_ddpm._typing import Image, Time
from jax_ddpm.models.layers import Block, BlockConfig, Features, Level, TimeEmbedding, way_down
from jax_ddpm.models.unet import check_blocks, check_heads, time_sizes, way


class NoisyClassifier(nn.Module):
    """p(y | x_t) of Dhariwal & Nichol 2021, in NHWC. The defaults are those for 64×64 images.

    Attributes:
      sample_size: image size; only the pool `"attention"` depends on it.
      in_channels, num_classes: channels of the images, and number of classes.
      block_out_channels, down_block_types, layers_per_block, attention_head_dim: as in `UNet`.
      resnet_time_scale_shift, downsample_type, time_embedding_dim, time_proj_dim: as in `UNet`.
      dtype, param_dtype, precision: as in `UNet`.
      pool: how the last features become one vector per image. `"attention"`: a token attends to
        all pixels; `"adaptive"`: their mean; `"spatial"`, `"spatial_v2"`: the means of all blocks'
        features, then a hidden layer with ReLU, or with a norm and SiLU.
    """

    sample_size: int = 64
    in_channels: int = 3
    num_classes: int = 1000
    block_out_channels: Sequence[int] = (128, 256, 384, 512)
    down_block_types: Sequence[str] = ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 3)
    layers_per_block: int = 4
    attention_head_dim: int = 64
    resnet_time_scale_shift: str = "scale_shift"
    downsample_type: str = "resnet"
    time_embedding_dim: int | None = None
    time_proj_dim: int | None = None
    pool: str = "attention"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None

    @nn.compact
    def __call__(self, x: Image, t: Time) -> Float[Array, "batch classes"]:
        """Logits of `x`, [batch, height, width, in_channels], at step `t`, a number or [batch].

        Raises `ValueError` naming a field or a shape that does not fit.
        """
        self.check_fields()
        size = (self.sample_size,) * 2 if self.pool == "attention" else jnp.shape(x)[1:3]
        check_floats("x", x, (len(x), *size, self.in_channels))
        config = BlockConfig.of(self)
        down, middle = self.levels()
        embedding = TimeEmbedding(config, *time_sizes(self), name="time_embedding")(t, x)
        states = way_down(config, jnp.asarray(x), embedding, down)
        for level in middle:
            states.append(Block(config, level, name=level.name)(states[-1], embedding)[-1])
        hidden = states[-1]
        if self.pool.startswith("spatial"):
            hidden = jnp.concatenate([state.mean((1, 2)) for state in states], axis=-1)
            hidden = config.dense(2048, "hidden")(hidden)
        normed = self.pool != "spatial"
        hidden = nn.silu(config.norm("norm_out")(hidden)) if normed else nn.relu(hidden)
        if self.pool == "attention":
            pool = _AttentionPool(config, self.attention_head_dim, self.num_classes, name="out")
            return pool(hidden)
        hidden = hidden.mean((1, 2)) if self.pool == "adaptive" else hidden
        return config.dense(self.num_classes, "out")(hidden)

    def levels(self) -> tuple[list[Level], list[Level]]:
        """The blocks on the way down, and the one in the middle."""
        down, features = way(self, "down", self.layers_per_block), self.block_out_channels[-1]
        return down, [Level("mid_block", features, 2, 1, self.attention_head_dim, None)]

    def check_fields(self) -> None:
        """Raises `FieldError` naming a field that does not fit."""
        check_blocks(self, BlockConfig.norm_num_groups)
        check_heads(self, "attention_head_dim")


class _AttentionPool(nn.Module):
    """The mean of all pixels attends to them and to itself (Radford et al. 2021, CLIP)."""

    config: BlockConfig
    head_dim: int
    features: int

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch features"]:
        config, (batch, *_, channels) = self.config, x.shape
        tokens = x.reshape(batch, -1, channels)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        normal, shape = nn.initializers.normal(channels**-0.5), tokens.shape[1:]
        positions = self.param("positions", normal, shape, config.param_dtype)
        tokens = tokens + positions.astype(tokens.dtype)[None]
        mixed = config.attend(tokens[:, :1], tokens, self.head_dim)
        return config.dense(self.features, "to_out")(mixed.reshape(batch, channels))


class FeatureClassifier(nn.Module):
    """A small classifier of clean images; its last hidden layer is a feature vector.

    One dense layer over patches, at most 8×8 of them, then three over all patches together.
    Images larger than 32×32 are shrunk first.
    """

    num_classes: int

    @nn.compact
    def __call__(self, images: Image) -> tuple[Array, Array]:
        """Features [batch, 64], the last hidden layer before its ReLU, and logits of images."""
        batch, height, width, channels = images.shape
        size = (batch, min(height, 32), min(width, 32), channels)
        x = jax.image.resize(jnp.asarray(images), size, "linear")
        side = -(-max(size[1:3]) // 8)
        # Whole patches: the last row and column are repeated.
        rest = [(0, -length % side) for length in size[1:3]]
        x = jnp.pad(x, ((0, 0), *rest, (0, 0)), "edge")
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(batch, rows, side, columns, side, channels).swapaxes(2, 3)
        x = nn.relu(nn.Dense(64)(x.reshape(batch, rows * columns, -1)))
        x = nn.relu(nn.Dense(256)(x.reshape(batch, -1)))
        features = nn.Dense(64)(x)
        return features, nn.Dense(self.num_classes)(nn.relu(features))
