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
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm._errors import (
    FieldError,
    check_choice,
    check_floats,
    check_positive,
    check_shape,
    check_whole,
)
from jax_ddpm._typing import Image, Label, Time
from jax_ddpm.models.layers import ACTIVATIONS, Block, BlockConfig, Level, TimeEmbedding, way_down
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
    "pool": ("attention", "adaptive", "spatial", "spatial_v2"),
}


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
      flip_sin_to_cos: whether cosines come before sines.
      freq_shift: 1 makes the sinusoids' last frequency exactly 1e-4; 0 stops just above it.
      num_class_embeds: number of labels, including the null label of guidance; None for none.
      center_input_sample: whether images in [0, 1] are mapped to [-1, 1] first.
      dtype: dtype of the computation; None means that of inputs and parameters.
      param_dtype: dtype of the parameters.
      precision: of matrix products; GPUs and TPUs use TF32 or bfloat16 unless `"highest"`.
      remat: whether gradients recompute each layer's activations instead of storing them.

    Examples:
      >>> kinds = {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
      >>> model = ddpm.UNet(block_out_channels=[32], num_class_embeds=11, **kinds)
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
        """Predict ε, x_0 or v for `x`, [batch, height, width, in_channels].

        Args:
          t: the step number, [batch] or one for all images.
          labels: [batch], with `num_class_embeds`. A traced label out of range gives NaN.
          train: whether dropout is on; it draws from the Flax stream `"dropout"`.

        Raises `ValueError` naming a field, a shape or a concrete label that does not fit.
        """
        self.check_fields()
        check_floats("x", x, (*jnp.shape(x)[:3], self.in_channels))
        batch, height, width, _ = jnp.shape(x)
        halvings, rows = 2 ** (len(self.block_out_channels) - 1), self.num_class_embeds
        if height % halvings or width % halvings:
            expected = f"expected height and width to be multiples of {halvings}"
            raise FieldError("x", f"{expected}, got {height}×{width}")
        if rows is None and labels is not None:
            raise FieldError("labels", "expected None where num_class_embeds is None")
        config = BlockConfig.of(self, deterministic=not train)
        down, middle, up = self.levels()
        waves = (*time_sizes(self), self.flip_sin_to_cos, self.freq_shift, self.time_scale)
        embedding = TimeEmbedding(config, *waves, name="time_embedding")(t, x)
        if rows is not None:
            check_whole("labels", labels, 0, rows - 1)
            check_shape("labels", labels, (batch,))
            features = embedding.shape[-1]
            table = nn.Embed(rows, features, param_dtype=self.param_dtype, name="class_embedding")
            (vectors,) = table.promote_dtype(table.embedding, dtype=self.dtype)
            embedding += look_up(vectors, jnp.asarray(labels), labels, mode="fill")
        x = jnp.asarray(x)
        skips = way_down(config, 2 * x - 1 if self.center_input_sample else x, embedding, down)
        hidden = skips[-1]
        for level in middle:
            groups, scale = self.attn_norm_num_groups, self.mid_block_scale_factor
            if groups is None and self.resnet_time_scale_shift == "scale_shift":
                groups = 0
            own = replace(config, attention_groups=groups, output_scale_factor=scale)
            hidden = Block(own, level, name=level.name)(hidden, embedding)[-1]
        for level in up:
            seen = [skips.pop() for _ in range(level.resnets)]
            hidden = Block(config, level, name=level.name)(hidden, embedding, seen)[-1]
        hidden = nn.silu(config.norm("conv_norm_out")(hidden))
        return config.conv(self.out_channels, "conv_out", kernel_init=nn.initializers.zeros)(hidden)

    def levels(self) -> tuple[list[Level], list[Level], list[Level]]:
        """The blocks on the way down, in the middle (one or none) and on the way up."""
        layers, heads = self.layers_per_block, self.num_attention_heads
        down = way(self, "down", layers, heads)
        attentions, last = int(self.add_attention), down[-1]
        middle = [Level("mid_block", last.features, 2, attentions, last.head_dim, None)]
        up = way(self, "up", layers + 1, self.num_attention_heads_upsample or heads)
        return down, middle if self.mid_block_type else [], up

    def check_fields(self) -> None:
        """Raises `FieldError` naming a field that does not fit."""
        check_positive(norm_num_groups=self.norm_num_groups, time_scale=self.time_scale)
        for name in ("layers_per_block", "out_channels", "num_class_embeds", "sample_size"):
            if (value := getattr(self, name)) is not None:
                check_whole(name, value, 1)
        check_blocks(self, self.norm_num_groups)
        check_whole("time_proj_dim", time_sizes(self)[0], 2 * self.freq_shift + 2)
        if not 0 <= self.dropout < 1:
            raise FieldError("dropout", f"expected 0 to 1, below 1, got {self.dropout}")
        attended = check_heads(self, "num_attention_heads", "num_attention_heads_upsample")
        head_dim, heads = self.attention_head_dim, self.num_attention_heads
        if head_dim and (heads or self.num_attention_heads_upsample):
            raise FieldError("attention_head_dim", f"expected None beside heads, got {head_dim}")
        if head_dim is not None and attended:
            check_whole("attention_head_dim", head_dim, 1, attended[0])


def time_sizes(network: Any) -> tuple[int, int]:
    """The number of sinusoids of a network's time embedding, and its channels."""
    first = network.block_out_channels[0]
    return network.time_proj_dim or first, network.time_embedding_dim or 4 * first


def way(network: Any, direction: str, resnets: int, heads: int | None = None) -> list[Level]:
    """The blocks `down_blocks_…` or `up_blocks_…` of a network; the last one keeps the size."""
    channels = network.block_out_channels[:: 1 if direction == "down" else -1]
    kinds = getattr(network, f"{direction}_block_types")
    resample = getattr(network, f"{direction}sample_type")
    levels = []
    for number, (features, kind) in enumerate(zip(channels, kinds, strict=True)):
        attends = kind.startswith("Attn")
        by = resample if attends else "resnet" if kind.startswith("Resnet") else "conv"
        by = by if number < len(channels) - 1 else None
        size = features // heads if heads else network.attention_head_dim or features  # one head
        name = f"{direction}_blocks_{number}"
        levels.append(Level(name, features, resnets, attends * resnets, size, by))
    return levels


def check_blocks(network: Any, groups: int) -> None:
    """Raises `FieldError` naming a field with a wrong choice, length or number of channels."""
    channels = network.block_out_channels
    for name in filter(partial(hasattr, network), _CHOICES):
        value, several = getattr(network, name), name.endswith("block_types")
        for each in value if several else [value]:
            check_choice(name, each, _CHOICES[name])
        if several and len(value) != len(channels):
            expected = f"expected {len(channels)} (one for each of block_out_channels)"
            raise FieldError(name, f"{expected}, got {len(value)}")
    for each in channels:
        if each % groups:
            expected = f"expected multiples of norm_num_groups, {groups}"
            raise FieldError("block_out_channels", f"{expected}, got {each}")


def check_heads(network: Any, *divisors: str) -> list[int]:
    """The channels of all blocks with attention. Raises `FieldError` naming the first of these
    fields, numbers of heads or their channels, that does not divide them."""
    blocks = itertools.chain(*network.levels())
    attended = sorted({each.features for each in blocks if each.attentions})
    for name in divisors:
        value = getattr(network, name)
        if value is not None and any(value < 1 or each % value for each in attended):
            raise FieldError(name, f"expected a divisor of each of {attended}, got {value}")
    return attended
