"""The classifier of noisy images that guides a diffusion: Dhariwal & Nichol 2021, §4.

    x ─ conv_in ─ down_blocks ─ mid_block ─ pool ─▶ logits of the classes
    t ─ sinusoids ─ time_embedding ─▶ every residual block

The way down is that of `UNet`, with its names.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm._errors import check_choice, check_floats
from jax_ddpm._typing import Image, Time
from jax_ddpm.models.attention import dot_product_attention
from jax_ddpm.models.blocks import DOWN_BLOCKS, MidBlock, way_down
from jax_ddpm.models.layers import BlockConfig, Features, embed_time

_GROUPS = 32


class NoisyClassifier(nn.Module):
    """p(y | x_t) of Dhariwal & Nichol 2021, NHWC. The defaults are those of their 64×64 images.

    Attributes:
      sample_size: height and width; the pool `"attention"` takes no other, other pools take any.
      in_channels, num_classes: of the images, and of the output.
      block_out_channels, down_block_types, layers_per_block, attention_head_dim,
        resnet_time_scale_shift, downsample_type, time_embedding_dim, time_proj_dim, dtype,
        param_dtype, precision: as those of `UNet`.
      pool: how the last features become one vector per image. `"attention"`: a token attends to
        all pixels; `"adaptive"`: their mean; `"spatial"` or `"spatial_v2"`: the means of the
        features of all blocks, then a hidden layer with ReLU, or with a norm and SiLU.
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
        """Logits for `x`, [batch, height, width, in_channels], at step `t`, as in `UNet`.

        Raises `ValueError` naming a field or a shape that does not fit.
        """
        self.check_fields()
        size = (self.sample_size,) * 2 if self.pool == "attention" else jnp.shape(x)[1:3]
        check_floats("x", x, (len(x), *size, self.in_channels))
        config = BlockConfig(
            norm_num_groups=_GROUPS,
            norm_eps=1e-5,
            act_fn="silu",
            dropout=0.0,
            resnet_time_scale_shift=self.resnet_time_scale_shift,
            attention_head_dim=self.attention_head_dim,
            num_attention_heads=None,
            deterministic=True,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        first = self.block_out_channels[0]
        embedding = embed_time(
            config,
            t,
            x,
            waves=self.time_proj_dim or first,
            features=self.time_embedding_dim or 4 * first,
            flip_sin_to_cos=True,
            freq_shift=0,
        )
        states = way_down(
            config,
            config.conv(first, "conv_in")(x),
            embedding,
            channels=self.block_out_channels,
            kinds=self.down_block_types,
            layers=self.layers_per_block,
            downsample_type=self.downsample_type,
            downsample_padding=1,
            remat=False,
        )
        middle = MidBlock(config, True, _GROUPS, 1, remat=False, name="mid_block")
        states.append(middle(states[-1], embedding))
        if self.pool.startswith("spatial"):
            hidden = jnp.concatenate([state.mean((1, 2)) for state in states], axis=-1)
            hidden = config.dense(2048, "hidden")(hidden)
            if self.pool == "spatial":
                hidden = nn.relu(hidden)
            else:
                hidden = nn.silu(config.norm("norm_out")(hidden))
            return config.dense(self.num_classes, "out")(hidden)
        hidden = nn.silu(config.norm("norm_out")(states[-1]))
        if self.pool == "adaptive":
            return config.dense(self.num_classes, "out")(hidden.mean((1, 2)))
        return _AttentionPool(config, self.num_classes, name="out")(hidden)

    def check_fields(self) -> None:
        """Raises `ValueError` naming a field that does not fit."""
        check_choice("pool", self.pool, ("attention", "adaptive", "spatial", "spatial_v2"))
        for name, choices in (
            ("downsample_type", ("conv", "resnet")),
            ("resnet_time_scale_shift", ("default", "scale_shift")),
        ):
            check_choice(name, getattr(self, name), choices)
        levels, kinds = len(self.block_out_channels), self.down_block_types
        if len(kinds) != levels:
            raise ValueError(
                f"down_block_types: expected {levels} (one for each of block_out_channels), "
                f"got {len(kinds)}"
            )
        for channels, kind in zip(self.block_out_channels, kinds, strict=True):
            check_choice("down_block_types", kind, DOWN_BLOCKS)
            if channels % _GROUPS:
                raise ValueError(
                    f"block_out_channels: expected multiples of {_GROUPS}, got {channels}"
                )
            attended = kind.startswith("Attn") or channels == self.block_out_channels[-1]
            if attended and channels % self.attention_head_dim:
                raise ValueError(
                    f"attention_head_dim: expected a divisor of {channels}, "
                    f"got {self.attention_head_dim}"
                )


class _AttentionPool(nn.Module):
    """The mean of all pixels attends to them and to itself (Radford et al. 2021, CLIP)."""

    config: BlockConfig
    features: int

    @nn.compact
    def __call__(self, x: Features) -> Float[Array, "batch features"]:
        config, channels = self.config, x.shape[-1]
        tokens = x.reshape(len(x), -1, channels)
        tokens = jnp.concatenate([tokens.mean(1, keepdims=True), tokens], axis=1)
        positions = self.param(
            "positions",
            nn.initializers.normal(channels**-0.5),
            tokens.shape[1:],
            config.param_dtype,
        )
        tokens = tokens + positions.astype(tokens.dtype)[None]
        heads, head_dim = config.heads(channels)
        query, key, value = (
            config.dense(channels, name)(each).reshape(len(x), -1, heads, head_dim)
            for name, each in (("to_q", tokens[:, :1]), ("to_k", tokens), ("to_v", tokens))
        )
        mixed = dot_product_attention(query, key, value, precision=config.precision)
        return config.dense(self.features, "to_out")(mixed.reshape(len(x), channels))
