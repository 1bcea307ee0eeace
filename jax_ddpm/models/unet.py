"""The U-Net of the DDPM papers, configured in the words of diffusers' `UNet2DModel`.

    x ─ conv_in ─ down_blocks ─ mid_block ─ up_blocks ─ norm, silu, conv_out ─▶ ε, x_0 or v
                      └─────── skips ───────────▲
    t ─ sinusoids ─ time_embedding (+ class_embedding of the label) ─▶ every residual block

Submodules carry diffusers' names (`down_blocks_0/resnets_1/conv1`), which is all that
`interop.diffusers` needs to know of it.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm._errors import FieldError, check_choice, check_floats, check_positive, check_whole
from jax_ddpm._typing import Image, Label, Time
from jax_ddpm.models.blocks import DOWN_BLOCKS, MidBlock, UpBlock, resampling, way_down
from jax_ddpm.models.layers import ACTIVATIONS, BlockConfig, embed_time
from jax_ddpm.schedule import look_up


class UNet(nn.Module):
    """Ho et al. 2020, Appendix B, and its successors, NHWC. The defaults are their CIFAR-10 net.

    Attributes:
      sample_size: height and width it is meant for; recorded, any size that halves runs.
      in_channels, out_channels: of the images, and of the output (twice as many where the
        variance is learned).
      block_out_channels: one for each resolution, from the full one down.
      down_block_types, up_block_types: `"DownBlock2D"`, `"AttnDownBlock2D"` or
        `"ResnetDownsampleBlock2D"`, from the full resolution down; `"UpBlock2D"`,
        `"AttnUpBlock2D"` or `"ResnetUpsampleBlock2D"`, from the lowest up.
      layers_per_block: residual blocks at each resolution on the way down; one more going up.
      mid_block_type: `"UNetMidBlock2D"`, or None for no block in the middle.
      mid_block_scale_factor: the middle's outputs are divided by it.
      add_attention: whether the middle has attention.
      attention_head_dim: channels of a head; None means one head.
      num_attention_heads: heads at every resolution, in place of `attention_head_dim`.
      num_attention_heads_upsample: those of the way up; None means as many as down.
      norm_num_groups, norm_eps: of all group norms.
      attn_norm_num_groups: of the middle's attention; None means `norm_num_groups`, or no norm
        under `"scale_shift"` (as diffusers).
      resnet_time_scale_shift: the time is added (`"default"`), or scales and shifts
        (`"scale_shift"`).
      downsample_padding: 1, or 0 to pad below and to the right only.
      downsample_type: `"conv"`, or `"resnet"`: `"AttnDownBlock2D"` then halves inside a residual
        block, as `"ResnetDownsampleBlock2D"` always does and `"DownBlock2D"` never.
      upsample_type: the same of `"AttnUpBlock2D"`, which doubles.
      act_fn: `"silu"`, `"swish"`, `"mish"`, `"gelu"` or `"relu"`, inside residual blocks.
      dropout: in residual blocks, while training.
      time_embedding_dim: None means 4 × the first of `block_out_channels`.
      time_proj_dim: number of sinusoids; None means the first of `block_out_channels`.
      time_scale: t is multiplied by it before the sinusoids.
      flip_sin_to_cos, freq_shift: of the sinusoids, see `models.layers.embed_time`.
      num_class_embeds: number of labels, the null label of guidance included; None for none.
      center_input_sample: whether images come in [0, 1] and are centred first.
      dtype: of the computation; that of the inputs and parameters where None.
      param_dtype: of the parameters.
      precision: of products; GPUs and TPUs drop to TF32 or bfloat16 unless `"highest"`.
      remat: whether gradients recompute each block instead of keeping what is inside it.
    """

    sample_size: int | Sequence[int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: Sequence[int] = (128, 256, 256, 256)
    down_block_types: Sequence[str] = (
        "DownBlock2D",
        "AttnDownBlock2D",
        "DownBlock2D",
        "DownBlock2D",
    )
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
        """Predict from `x`, [batch, height, width, in_channels], at step `t`, a number or [batch].

        `labels` [batch] goes with `num_class_embeds`. `train` turns dropout on, which draws from
        the Flax stream `"dropout"`. Raises `ValueError` naming what does not fit: a field, a
        shape, or a concrete label out of range (a traced one makes NaN).
        """
        self.check_fields()
        self._check_inputs(x, labels)
        config = BlockConfig(
            norm_num_groups=self.norm_num_groups,
            norm_eps=self.norm_eps,
            act_fn=self.act_fn,
            dropout=self.dropout,
            resnet_time_scale_shift=self.resnet_time_scale_shift,
            attention_head_dim=self.attention_head_dim,
            num_attention_heads=self.num_attention_heads,
            deterministic=not train,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
        )
        embedding = self._embed(config, x, t, labels)
        hidden = jnp.asarray(x)
        if self.center_input_sample:
            hidden = 2 * hidden - 1
        hidden = config.conv(self.block_out_channels[0], "conv_in")(hidden)
        skips = way_down(
            config,
            hidden,
            embedding,
            channels=self.block_out_channels,
            kinds=self.down_block_types,
            layers=self.layers_per_block,
            downsample_type=self.downsample_type,
            downsample_padding=self.downsample_padding,
            remat=self.remat,
        )
        hidden = skips[-1]
        if self.mid_block_type is not None:
            hidden = self._mid_block(config)(hidden, embedding)
        heads = self.num_attention_heads_upsample or self.num_attention_heads
        config = replace(config, num_attention_heads=heads)
        last = len(self.block_out_channels) - 1
        for level, (features, kind) in enumerate(
            zip(reversed(self.block_out_channels), self.up_block_types, strict=True)
        ):
            layers = self.layers_per_block + 1
            block = UpBlock(
                config,
                features,
                attention=kind == "AttnUpBlock2D",
                upsample=resampling(kind, self.upsample_type) if level < last else None,
                remat=self.remat,
                name=f"up_blocks_{level}",
            )
            hidden = block(hidden, skips[-layers:], embedding)
            skips = skips[:-layers]
        hidden = nn.silu(config.norm("conv_norm_out")(hidden))
        zeros = nn.initializers.zeros_init()
        return config.conv(self.out_channels, "conv_out", kernel_init=zeros)(hidden)

    def _embed(self, config: BlockConfig, x: Image, t: Time, labels: Label | None) -> Array:
        features = self.time_embedding_dim or 4 * self.block_out_channels[0]
        embedding = embed_time(
            config,
            t,
            x,
            waves=self.time_proj_dim or self.block_out_channels[0],
            features=features,
            flip_sin_to_cos=self.flip_sin_to_cos,
            freq_shift=self.freq_shift,
            scale=self.time_scale,
        )
        if self.num_class_embeds is None:
            return embedding
        table = nn.Embed(
            self.num_class_embeds,
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            name="class_embedding",
        )
        (rows,) = table.promote_dtype(table.embedding, dtype=self.dtype)
        return embedding + look_up(rows, jnp.asarray(labels), labels, mode="fill")

    def _mid_block(self, config: BlockConfig) -> MidBlock:
        groups = self.attn_norm_num_groups
        if groups is None and self.resnet_time_scale_shift == "default":
            groups = self.norm_num_groups
        return MidBlock(
            config,
            attention=self.add_attention,
            norm_num_groups=groups,
            output_scale_factor=self.mid_block_scale_factor,
            remat=self.remat,
            name="mid_block",
        )

    def check_fields(self) -> None:
        """Raises `ValueError` naming a field that does not fit."""
        for name, kinds in (
            ("down_block_types", DOWN_BLOCKS),
            ("up_block_types", ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")),
        ):
            types = getattr(self, name)
            for kind in types:
                check_choice(name, kind, kinds)
            if len(types) != len(self.block_out_channels):
                raise ValueError(
                    f"{name}: expected {len(self.block_out_channels)} (one for each of "
                    f"block_out_channels), got {len(types)}"
                )
        check_choice("mid_block_type", self.mid_block_type, ("UNetMidBlock2D", None))
        check_choice("act_fn", self.act_fn, tuple(ACTIVATIONS))
        check_choice("downsample_padding", self.downsample_padding, (0, 1))
        check_choice("downsample_type", self.downsample_type, ("conv", "resnet"))
        check_choice("upsample_type", self.upsample_type, ("conv", "resnet"))
        check_choice(
            "resnet_time_scale_shift", self.resnet_time_scale_shift, ("default", "scale_shift")
        )
        for name in (
            "in_channels",
            "out_channels",
            "norm_num_groups",
            "num_class_embeds",
            "time_proj_dim",
            "time_scale",
        ):
            check_positive(**{name: getattr(self, name)})
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: expected 0 to 1, below 1, got {self.dropout}")
        waves = self.time_proj_dim or self.block_out_channels[0]
        if waves // 2 <= self.freq_shift:
            raise ValueError(
                f"time_proj_dim: expected at least {2 * self.freq_shift + 2} for freq_shift "
                f"{self.freq_shift}, got {waves}"
            )
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"block_out_channels: expected multiples of norm_num_groups "
                    f"{self.norm_num_groups}, got {channels}"
                )
        attended = self._attended()
        for name in ("num_attention_heads", "num_attention_heads_upsample"):
            heads = getattr(self, name)
            check_positive(**{name: heads})
            if heads is not None and self.attention_head_dim is not None:
                raise ValueError(f"{name}: expected None beside attention_head_dim, got {heads}")
            if heads is not None and self.num_attention_heads is None:
                raise ValueError(f"{name}: expected None without num_attention_heads, got {heads}")
            if heads is not None and any(channels % heads for channels in attended):
                raise ValueError(
                    f"{name}: expected a divisor of the channels that have attention, "
                    f"{', '.join(map(str, sorted(set(attended))))}, got {heads}"
                )
        head = self.attention_head_dim
        if head is not None and attended and not 1 <= head <= min(attended):
            raise ValueError(
                f"attention_head_dim: expected 1 to {min(attended)}, the fewest channels that "
                f"have attention, got {head}"
            )

    def _attended(self) -> list[int]:
        """The channels of every level that has attention."""
        channels = self.block_out_channels
        down = zip(channels, self.down_block_types, strict=True)
        up = zip(reversed(channels), self.up_block_types, strict=True)
        middle = [channels[-1]] if self.mid_block_type and self.add_attention else []
        return middle + [count for count, kind in (*down, *up) if kind.startswith("Attn")]

    def _check_inputs(self, x: Image, labels: Label | None) -> None:
        check_floats("x", x, (*jnp.shape(x)[:3], self.in_channels))
        batch, height, width, _ = jnp.shape(x)
        halvings = 2 ** (len(self.block_out_channels) - 1)
        if height % halvings or width % halvings:
            raise ValueError(
                f"x: expected height and width to be multiples of {halvings}, got {height}×{width}"
            )
        if self.num_class_embeds is None:
            if labels is not None:
                raise ValueError("labels: expected None where num_class_embeds is None, got labels")
            return
        if labels is None:
            raise ValueError("labels: expected integers [batch] for num_class_embeds, got None")
        check_whole("labels", labels, 0, self.num_class_embeds - 1)
        if jnp.shape(labels) != (batch,):
            raise FieldError("labels", f"expected shape {(batch,)}, got {jnp.shape(labels)}")
