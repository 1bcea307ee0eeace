"""The U-Net of the DDPM papers, configured with the field names of diffusers' `UNet2DModel`.

    x ─ conv_in ─ down_blocks ─ mid_block ─ up_blocks ─ norm, silu, conv_out ─▶ ε, x_0 or v
                      └─────── skips ───────────▲
    t ─ sinusoids ─ time_embedding (+ class_embedding of the label) ─▶ every residual block

Submodules have diffusers' names (`down_blocks_0/resnets_1/conv1`). `UNet.levels` describes the
blocks; the network is built from that description, and `interop` can number tensors by it.
"""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm._errors import FieldError, check_choice, check_floats, check_positive, check_whole
from jax_ddpm._typing import Image, Label, Time
from jax_ddpm.models.layers import (
    ACTIVATIONS,
    BlockConfig,
    Embedding,
    Features,
    Resample,
    TimeEmbedding,
    double,
    halve,
)
from jax_ddpm.schedule import look_up

_CHOICES: dict[str, Sequence[Any]] = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": ("UNetMidBlock2D", None),
    "act_fn": tuple(ACTIVATIONS),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}


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


class Levels(NamedTuple):
    """All blocks, in the order of the data; the middle has one or none."""

    down: list[Level]
    middle: list[Level]
    up: list[Level]


class UNet(nn.Module):
    """The U-Net of Ho et al. 2020, Appendix B, and its successors, in NHWC.

    The defaults are Ho et al.'s CIFAR-10 network.

    Attributes:
      sample_size: nominal image size, stored in configs only; any size divisible by
        2**(levels - 1) works.
      in_channels, out_channels: channels of the images and of the output (twice as many for a
        learned variance).
      block_out_channels: channels at each resolution, from the highest down.
      down_block_types, up_block_types: a block for each resolution, from the highest down and from
        the lowest up: `"DownBlock2D"`, `"AttnDownBlock2D"` or `"ResnetDownsampleBlock2D"`, and
        `"UpBlock2D"`, `"AttnUpBlock2D"` or `"ResnetUpsampleBlock2D"`.
      layers_per_block: residual blocks at each resolution on the way down; one more on the way up.
      mid_block_type: `"UNetMidBlock2D"`, or None for no middle block.
      mid_block_scale_factor: divisor of the middle block's outputs.
      add_attention: whether the middle block has attention.
      attention_head_dim: channels of an attention head; None means one head.
      num_attention_heads: heads at every resolution, instead of `attention_head_dim`.
      num_attention_heads_upsample: heads on the way up; None means as many as on the way down.
      norm_num_groups, norm_eps: groups and ε of the group norms.
      attn_norm_num_groups: groups in the middle block's attention; None means `norm_num_groups`,
        or no norm with `"scale_shift"` (as in diffusers).
      resnet_time_scale_shift: whether the time embedding is added (`"default"`) or scales and
        shifts (`"scale_shift"`).
      downsample_padding: 1, or 0 to pad only the last row and column.
      downsample_type, upsample_type: how blocks with attention change the size: by a convolution
        (`"conv"`) or in a residual block (`"resnet"`). Other blocks' names decide that.
      act_fn: `"silu"`, `"swish"`, `"mish"`, `"gelu"` or `"relu"`, inside residual blocks.
      dropout: dropout rate inside residual blocks, in training.
      time_embedding_dim: channels of the time embedding; None means 4 × `block_out_channels[0]`.
      time_proj_dim: number of sinusoids; None means `block_out_channels[0]`.
      time_scale: factor on t before the sinusoids.
      flip_sin_to_cos, freq_shift: see `models.layers.TimeEmbedding`.
      num_class_embeds: number of labels, including the null label of guidance; None for none.
      center_input_sample: whether images in [0, 1] are mapped to [-1, 1] first.
      dtype: dtype of the computation; None means that of inputs and parameters.
      param_dtype: dtype of the parameters.
      precision: of matrix products; GPUs and TPUs use TF32 or bfloat16 unless `"highest"`.
      remat: whether gradients recompute each layer's activations instead of storing them.

    >>> import jax, jax.numpy as jnp
    >>> kinds = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    >>> model = UNet(block_out_channels=[32], num_class_embeds=11, **kinds)
    >>> x, t, labels = jnp.zeros((2, 8, 8, 3)), jnp.array([0, 999]), jnp.array([3, 10])
    >>> init = lambda key: model.init(key, x, t, labels)  # call jax.jit(init)(key) for weights
    >>> variables = jax.eval_shape(init, jax.random.key(0))
    >>> jax.eval_shape(model.apply, variables, x, t, labels).shape
    (2, 8, 8, 3)
    """

    sample_size: int | Sequence[int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (128, 256, 256, 256)
    down_block_types: Sequence[str] = ("DownBlock2D", "AttnDownBlock2D", *("DownBlock2D",) * 2)
    up_block_types: Sequence[str] = ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    layers_per_block: int = 2
    mid_block_type: str | None = "UNetMidBlock2D"
    mid_block_scale_factor: int | float = 1
    add_attention: bool = True
    attention_head_dim: int | None = None
    num_attention_heads: int | None = None
    num_attention_heads_upsample: int | None = None
    norm_num_groups: int = 32
    norm_eps: int | float = 1e-6
    attn_norm_num_groups: int | None = None
    resnet_time_scale_shift: str = "default"
    downsample_padding: int = 0
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    act_fn: str = "silu"
    dropout: int | float = 0.0
    time_embedding_dim: int | None = None
    time_proj_dim: int | None = None
    time_scale: int | float = 1
    flip_sin_to_cos: bool = False
    freq_shift: int = 1
    num_class_embeds: int | None = None
    center_input_sample: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    remat: bool = False

    @nn.compact
    def __call__(
        self, x: Image, t: Time, labels: Label | None = None, *, train: bool = False
    ) -> Array:
        """Predict ε, x_0 or v.

        Args:
          x: [batch, height, width, in_channels].
          t: the step number, [batch] or one for all images.
          labels: [batch], with `num_class_embeds`.
          train: whether dropout is on; it draws from the Flax stream `"dropout"`.

        Raises:
          ValueError: a field or a shape does not fit, or a concrete label is out of range (a traced
            one gives NaN). The message names it.
        """
        self.check_fields()
        self._check_inputs(x, labels)
        config = BlockConfig.of(self, deterministic=not train)
        down, middle, up = self.levels()
        first = self.block_out_channels[0]
        waves, features = self.time_proj_dim or first, self.time_embedding_dim or 4 * first
        sinusoids = (self.flip_sin_to_cos, self.freq_shift, self.time_scale)
        embedding = TimeEmbedding(config, waves, features, *sinusoids, name="time_embedding")(t, x)
        if self.num_class_embeds is not None:
            dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
            table = nn.Embed(self.num_class_embeds, features, name="class_embedding", **dtypes)
            (rows,) = table.promote_dtype(table.embedding, dtype=self.dtype)
            embedding += look_up(rows, jnp.asarray(labels), labels, mode="fill")
        hidden = 2 * jnp.asarray(x) - 1 if self.center_input_sample else jnp.asarray(x)
        skips = way_down(config, hidden, embedding, down)
        hidden = skips[-1]
        for level in middle:
            groups = self.attn_norm_num_groups
            if groups is None and self.resnet_time_scale_shift == "scale_shift":
                groups = 0
            scale = self.mid_block_scale_factor
            own = replace(config, attention_groups=groups, output_scale_factor=scale)
            hidden = Block(own, level, name=level.name)(hidden, embedding)[-1]
        for level in up:
            seen = [skips.pop() for _ in range(level.resnets)]
            hidden = Block(config, level, name=level.name)(hidden, embedding, seen)[-1]
        hidden = nn.silu(config.norm("conv_norm_out")(hidden))
        zeros = nn.initializers.zeros_init()
        return config.conv(self.out_channels, "conv_out", kernel_init=zeros)(hidden)

    def levels(self) -> Levels:
        """The blocks of the network."""
        channels, layers = self.block_out_channels, self.layers_per_block
        heads = (self.num_attention_heads, self.attention_head_dim)
        down = way("down", channels, self.down_block_types, layers, self.downsample_type, *heads)
        attentions, last = int(self.add_attention), down[-1]
        middle = [Level("mid_block", last.features, 2, attentions, last.head_dim, None)]
        heads = (self.num_attention_heads_upsample or heads[0], heads[1])
        up = way("up", channels[::-1], self.up_block_types, layers + 1, self.upsample_type, *heads)
        return Levels(down, middle if self.mid_block_type else [], up)

    def check_fields(self) -> None:
        """Raises `FieldError` naming a field that does not fit."""
        check_positive(norm_num_groups=self.norm_num_groups, time_scale=self.time_scale)
        for name in ("layers_per_block", "out_channels", "num_class_embeds", "sample_size"):
            value = getattr(self, name)
            if value is not None:
                check_whole(name, value, 1)
        check_blocks(self, self.norm_num_groups)
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"expected 0 to 1, below 1, got {self.dropout}")
        waves, least = self.time_proj_dim or self.block_out_channels[0], 2 * self.freq_shift + 2
        if waves < least:
            problem = f"expected at least {least} for freq_shift {self.freq_shift}, got {waves}"
            raise FieldError("time_proj_dim", problem)
        blocks = itertools.chain(*self.levels())
        attended = sorted({each.features for each in blocks if each.attentions})
        head_dim, heads_up = self.attention_head_dim, self.num_attention_heads_upsample
        if head_dim is not None and (self.num_attention_heads or heads_up):
            raise FieldError("attention_head_dim", f"expected None beside heads, got {head_dim}")
        for name in ("num_attention_heads", "num_attention_heads_upsample"):
            value = getattr(self, name)
            if value is not None and any(value < 1 or each % value for each in attended):
                raise FieldError(name, f"expected a divisor of each of {attended}, got {value}")
        if attended and head_dim is not None and not 1 <= head_dim <= attended[0]:
            problem = f"expected 1 to {attended[0]}, got {head_dim}"
            raise FieldError("attention_head_dim", problem)

    def _check_inputs(self, x: Image, labels: Label | None) -> None:
        check_floats("x", x, (*jnp.shape(x)[:3], self.in_channels))
        batch, height, width, _ = jnp.shape(x)
        halvings = 2 ** (len(self.block_out_channels) - 1)
        if height % halvings or width % halvings:
            problem = f"expected height and width to be multiples of {halvings}"
            raise FieldError("x", f"{problem}, got {height}×{width}")
        if self.num_class_embeds is not None:
            check_whole("labels", labels, 0, self.num_class_embeds - 1)
            if (shape := jnp.asarray(labels).shape) != (batch,):
                raise FieldError("labels", f"expected shape {(batch,)}, got {shape}")
        elif labels is not None:
            raise FieldError("labels", "expected None where num_class_embeds is None, got labels")


def way(
    direction: str,
    channels: Sequence[int],
    kinds: Sequence[str],
    resnets: int,
    resample: str,
    heads: int | None,
    head_dim: int | None,
) -> list[Level]:
    """The blocks `down_blocks_…` or `up_blocks_…`; the last one keeps the size."""
    levels = []
    for number, (features, kind) in enumerate(zip(channels, kinds, strict=True)):
        attends = kind.startswith("Attn")
        by = resample if attends else "resnet" if kind.startswith("Resnet") else "conv"
        by = by if number < len(channels) - 1 else None
        size = features // heads if heads else head_dim or features  # without either, one head
        name = f"{direction}_blocks_{number}"
        levels.append(Level(name, features, resnets, attends * resnets, size, by))
    return levels


def check_blocks(network: Any, groups: int, **more_choices: Sequence[Any]) -> None:
    """Raises `FieldError` naming a field with a wrong choice, length or number of channels."""
    channels, choices_of = network.block_out_channels, {**_CHOICES, **more_choices}
    for name in filter(partial(hasattr, network), choices_of):
        value, several = getattr(network, name), name.endswith("block_types")
        for each in value if several else [value]:
            check_choice(name, each, choices_of[name])
        if several and len(value) != len(channels):
            problem = f"expected {len(channels)} (one for each of block_out_channels)"
            raise FieldError(name, f"{problem}, got {len(value)}")
    for each in channels:
        if each % groups:
            problem = f"expected multiples of norm_num_groups, {groups}, got {each}"
            raise FieldError("block_out_channels", problem)


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
            x = config.resnet(level.features, f"resnets_{number}")(x, embedding)
            if number < level.attentions:
                x = config.attention(level.head_dim, f"attentions_{number}")(x)
            states.append(x)
        name, resample = ("upsamplers_0", double) if upward else ("downsamplers_0", halve)
        if level.resample == "resnet":
            states.append(config.resnet(level.features, name, resample)(x, embedding))
        elif level.resample == "conv":
            states.append(Resample(config, upward, name=name)(x))
        return states


def way_down(config: BlockConfig, x: Array, embedding: Array, down: list[Level]) -> list[Array]:
    """The output of `conv_in` and of every layer after it, the lowest resolution last."""
    states = [config.conv(down[0].features, "conv_in")(x)]
    for level in down:
        states += Block(config, level, name=level.name)(states[-1], embedding)
    return states
