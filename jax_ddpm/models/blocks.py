"""The blocks of the U-Net, each of residual blocks and attention: down, in the middle, up."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm.models.layers import (
    Attention,
    BlockConfig,
    Downsample,
    Features,
    ResnetBlock,
    Upsample,
    double,
    halve,
)

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")


class DownBlock(nn.Module):
    """One resolution on the way down: its states, which the way up sees, its output last."""

    config: BlockConfig
    features: int
    layers: int
    attention: bool
    downsample: str | None
    downsample_padding: int
    remat: bool

    @nn.compact
    def __call__(self, x: Features, embedding: Array) -> list[Features]:
        resnet, attention = _blocks(self.remat)
        states = []
        for layer in range(self.layers):
            x = resnet(self.config, self.features, name=f"resnets_{layer}")(x, embedding)
            if self.attention:
                groups = self.config.norm_num_groups
                x = attention(self.config, groups, name=f"attentions_{layer}")(x)
            states.append(x)
        if self.downsample is None:
            return states
        name = "downsamplers_0"
        if self.downsample == "resnet":
            x = resnet(self.config, self.features, resample=halve, name=name)(x, embedding)
        else:
            x = Downsample(self.config, self.downsample_padding, name=name)(x)
        return [*states, x]


class MidBlock(nn.Module):
    """Two residual blocks at the lowest resolution, with attention between them."""

    config: BlockConfig
    attention: bool
    norm_num_groups: int | None
    output_scale_factor: int | float
    remat: bool

    @nn.compact
    def __call__(self, x: Features, embedding: Array) -> Features:
        resnet, attention = _blocks(self.remat)
        scale, features = self.output_scale_factor, x.shape[-1]
        x = resnet(self.config, features, scale, name="resnets_0")(x, embedding)
        if self.attention:
            x = attention(self.config, self.norm_num_groups, scale, name="attentions_0")(x)
        return resnet(self.config, features, scale, name="resnets_1")(x, embedding)


class UpBlock(nn.Module):
    """One resolution on the way up, beside what the way down saw of it."""

    config: BlockConfig
    features: int
    attention: bool
    upsample: str | None
    remat: bool

    @nn.compact
    def __call__(self, x: Features, skips: list[Features], embedding: Array) -> Features:
        resnet, attention = _blocks(self.remat)
        for layer, skip in enumerate(reversed(skips)):
            x = jnp.concatenate([x, skip], axis=-1)
            x = resnet(self.config, self.features, name=f"resnets_{layer}")(x, embedding)
            if self.attention:
                groups = self.config.norm_num_groups
                x = attention(self.config, groups, name=f"attentions_{layer}")(x)
        name = "upsamplers_0"
        if self.upsample == "resnet":
            x = resnet(self.config, self.features, resample=double, name=name)(x, embedding)
        elif self.upsample == "conv":
            x = Upsample(self.config, name=name)(x)
        return x


def way_down(
    config: BlockConfig,
    x: Features,
    embedding: Array,
    *,
    channels: Sequence[int],
    kinds: Sequence[str],
    layers: int,
    downsample_type: str,
    downsample_padding: int,
    remat: bool,
) -> list[Features]:
    """Every state from `x`, the full resolution, to the lowest, through `down_blocks_…`."""
    states = [x]
    for level, (features, kind) in enumerate(zip(channels, kinds, strict=True)):
        last = level == len(channels) - 1
        block = DownBlock(
            config,
            features,
            layers,
            attention=kind == "AttnDownBlock2D",
            downsample=None if last else resampling(kind, downsample_type),
            downsample_padding=downsample_padding,
            remat=remat,
            name=f"down_blocks_{level}",
        )
        states += block(states[-1], embedding)
    return states


def resampling(kind: str, chosen: str) -> str:
    """By what a block changes the size: as `chosen` if it has attention, otherwise as its name."""
    if kind.startswith("Attn"):
        return chosen
    return "resnet" if kind.startswith("Resnet") else "conv"


def _blocks(remat: bool) -> tuple[Any, Any]:
    if remat:
        return nn.remat(ResnetBlock), nn.remat(Attention)
    return ResnetBlock, Attention
