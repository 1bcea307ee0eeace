"""OpenAI's U-Net and noisy classifier (Nichol & Dhariwal 2021; Dhariwal & Nichol 2021) in PyTorch.

Modules carry the names of OpenAI's state dicts, so that their weights load. NCHW.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["CLASSIFIERS", "UNETS", "Classifier", "Network", "UNet"]


class ResBlock(nn.Module):
    """`resample` is 2 to double the size on both branches, 1/2 to halve it."""

    def __init__(
        self, channels: int, out: int, emb: int, scale_shift: bool, resample: float = 1
    ) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(_norm(channels), nn.SiLU(), _conv(channels, out))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, out * (1 + scale_shift)))
        self.out_layers = nn.Sequential(_norm(out), nn.SiLU(), nn.Dropout(0), _conv(out, out))
        same = channels == out
        self.skip_connection = nn.Identity() if same else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        norm, act, conv = self.in_layers
        hidden = conv(_resized(act(norm(x)), self.resample))
        norm, *rest = self.out_layers
        shift = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = shift.chunk(2, dim=1)
            hidden = norm(hidden) * (1 + scale) + shift
        else:
            hidden = norm(hidden + shift)
        for layer in rest:
            hidden = layer(hidden)
        return self.skip_connection(_resized(x, self.resample)) + hidden


class AttentionBlock(nn.Module):
    def __init__(self, channels: int, heads: int, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm = _norm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(2)
        mixed = _attend(self.qkv(tokens), self.heads, self.new_order)
        return x + self.proj_out(mixed).reshape(x.shape)


class Downsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = _conv(channels, channels)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.conv(_resized(x, 2))


class Block(nn.ModuleList):
    """Layers one after the other, each of which sees the time, but for the first convolution."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        for layer in self:
            x = layer(x) if isinstance(layer, nn.Conv2d) else layer(x, emb)
        return x


class _WayDown(nn.Module):
    """What both networks begin with.

    `attention` has the factors, 1, 2, 4 …, by which the images are smaller where it is. `heads`
    is their number, or None for heads of `head_channels`.
    """

    def __init__(
        self,
        width: int,
        multipliers: tuple[float, ...],
        blocks: int,
        attention: tuple[int, ...],
        *,
        heads: int | None,
        head_channels: int,
        scale_shift: bool,
        updown: bool,
        new_order: bool = False,
    ) -> None:
        super().__init__()
        self.width, self.emb = width, 4 * width
        first, last = nn.Linear(width, self.emb), nn.Linear(self.emb, self.emb)
        self.time_embed = nn.Sequential(first, nn.SiLU(), last)
        channels = int(multipliers[0] * width)
        self.input_blocks = nn.ModuleList([Block([_conv(3, channels)])])
        self.skips = [channels]
        for level, multiplier in enumerate(multipliers):
            for _ in range(blocks):
                out = int(multiplier * width)
                layers: list[nn.Module] = [ResBlock(channels, out, self.emb, scale_shift)]
                if 2**level in attention:
                    layers.append(AttentionBlock(out, heads or out // head_channels, new_order))
                channels = out
                self.input_blocks.append(Block(layers))
                self.skips.append(channels)
            if level < len(multipliers) - 1:
                smaller = Downsample(channels)
                if updown:
                    smaller = ResBlock(channels, channels, self.emb, scale_shift, 1 / 2)
                self.input_blocks.append(Block([smaller]))
                self.skips.append(channels)
        self.channels = channels
        self.middle_block = Block(
            [
                ResBlock(channels, channels, self.emb, scale_shift),
                AttentionBlock(channels, heads or channels // head_channels, new_order),
                ResBlock(channels, channels, self.emb, scale_shift),
            ]
        )

    def embed(self, t: Tensor) -> Tensor:
        weight, half = self.get_parameter("time_embed.0.weight"), self.width // 2
        frequencies = 10_000 ** (-torch.arange(half).to(weight) / half)
        angles = torch.outer(t.to(weight), frequencies)
        return self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))


class UNet(_WayDown):
    """`heads_up` is the number of heads on the way up, `None` as `heads`."""

    def __init__(
        self,
        width: int,
        multipliers: tuple[float, ...],
        blocks: int,
        attention: tuple[int, ...],
        *,
        out_channels: int = 3,
        classes: int | None = None,
        heads: int | None = 4,
        heads_up: int | None = None,
        head_channels: int = 64,
        scale_shift: bool = True,
        updown: bool = False,
        new_order: bool = False,
        time_scale: float = 1,
    ) -> None:
        super().__init__(
            width,
            multipliers,
            blocks,
            attention,
            heads=heads,
            head_channels=head_channels,
            scale_shift=scale_shift,
            updown=updown,
            new_order=new_order,
        )
        self.time_scale, channels, skips = time_scale, self.channels, list(self.skips)
        if classes is not None:
            self.label_emb = nn.Embedding(classes, self.emb)
        self.output_blocks = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(multipliers))):
            for block in range(blocks + 1):
                out = int(multiplier * width)
                layers: list[nn.Module] = [
                    ResBlock(channels + skips.pop(), out, self.emb, scale_shift)
                ]
                channels = out
                if 2**level in attention:
                    upward = heads_up or heads or channels // head_channels
                    layers.append(AttentionBlock(channels, upward, new_order))
                if level and block == blocks:
                    larger = Upsample(channels)
                    if updown:
                        larger = ResBlock(channels, channels, self.emb, scale_shift, 2)
                    layers.append(larger)
                self.output_blocks.append(Block(layers))
        self.out = nn.Sequential(_norm(channels), nn.SiLU(), _conv(channels, out_channels))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = self.embed(t * self.time_scale)
        if y is not None:
            emb = emb + self.label_emb(y)
        states = []
        for block in self.input_blocks:
            x = block(x, emb)
            states.append(x)
        x = self.middle_block(x, emb)
        for block in self.output_blocks:
            x = block(torch.cat([x, states.pop()], dim=1), emb)
        return self.out(x)


class AttentionPool(nn.Module):
    def __init__(self, tokens: int, channels: int, head_channels: int, out: int) -> None:
        super().__init__()
        self.heads = channels // head_channels
        self.positional_embedding = nn.Parameter(torch.randn(channels, tokens + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        tokens = torch.cat([tokens.mean(2, keepdim=True), tokens], dim=2)
        mixed = _attend(self.qkv_proj(tokens + self.positional_embedding), self.heads, True)
        return self.c_proj(mixed)[:, :, 0]


class Classifier(_WayDown):
    def __init__(
        self,
        size: int,
        width: int,
        multipliers: tuple[float, ...],
        blocks: int,
        attention: tuple[int, ...],
        *,
        classes: int = 1000,
        scale_shift: bool = True,
        updown: bool = True,
        pool: str = "attention",
    ) -> None:
        super().__init__(
            width,
            multipliers,
            blocks,
            attention,
            heads=None,
            head_channels=64,
            scale_shift=scale_shift,
            updown=updown,
        )
        self.spatial = pool.startswith("spatial")
        channels, states = self.channels, sum(self.skips) + self.channels
        tokens = (size // 2 ** (len(multipliers) - 1)) ** 2
        ends: dict[str, list[nn.Module]] = {
            "attention": [_norm(channels), nn.SiLU(), AttentionPool(tokens, channels, 64, classes)],
            "adaptive": [
                *(_norm(channels), nn.SiLU(), nn.AdaptiveAvgPool2d(1)),
                *(nn.Conv2d(channels, classes, 1), nn.Flatten()),
            ],
            "spatial": [nn.Linear(states, 2048), nn.ReLU(), nn.Linear(2048, classes)],
            "spatial_v2": [
                *(nn.Linear(states, 2048), _norm(2048), nn.SiLU()),
                nn.Linear(2048, classes),
            ],
        }
        self.out = nn.Sequential(*ends[pool])

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb, means = self.embed(t), []
        for block in [*self.input_blocks, self.middle_block]:
            x = block(x, emb)
            means.append(x.mean((2, 3)))
        return self.out(torch.cat(means, dim=1) if self.spatial else x)


def _attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    batch, channels, tokens = qkv.shape
    split = (3, heads) if new_order else (heads, 3)
    qkv = qkv.reshape(batch, *split, channels // (3 * heads), tokens)
    q, k, v = qkv.unbind(1 if new_order else 2)
    weights = torch.einsum("bhdq,bhdk->bhqk", q, k) / q.shape[2] ** 0.5
    return torch.einsum("bhqk,bhdk->bhdq", weights.softmax(-1), v).reshape(batch, -1, tokens)


def _resized(x: Tensor, factor: float) -> Tensor:
    if factor == 1:
        return x
    if factor == 2:
        return nn.functional.interpolate(x, scale_factor=2, mode="nearest")
    return nn.functional.avg_pool2d(x, 2)


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def _conv(channels: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(channels, out, 3, padding=1)


class Network(NamedTuple):
    """A network in small, and the flags that make it in OpenAI's code."""

    make: Callable[[], nn.Module]
    flags: str
    shape: tuple[int, ...] = (2, 16, 16, 3)
    """Of the images that it is tried on, NHWC."""
    timesteps: int = 1000
    classes: int | None = None


UNETS = {
    # The way up has its own number of heads; t is rescaled to 1,000 steps.
    "improved-diffusion's": Network(
        partial(
            *(UNet, 32, (1, 2), 1, (1, 2)), heads=2, heads_up=4, scale_shift=False, time_scale=0.25
        ),
        "--image_size 16 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --num_heads 2 "
        "--num_heads_upsample 4 --attention_resolutions 16,8 --use_scale_shift_norm False "
        "--diffusion_steps 4000 --rescale_timesteps True",
        timesteps=4000,
    ),
    "guided-diffusion's, 64×64": Network(
        partial(
            *(UNet, 32, (1, 2), 2, (2,)),
            heads=None,
            head_channels=16,
            updown=True,
            new_order=True,
            classes=1000,
            out_channels=6,
        ),
        "--image_size 16 --num_channels 32 --num_res_blocks 2 --channel_mult 1,2 "
        "--num_head_channels 16 --attention_resolutions 8 --resblock_updown True "
        "--use_new_attention_order True --class_cond True --learn_sigma True",
        classes=1000,
    ),
    # The first level has half as many channels as there are sinusoids.
    "guided-diffusion's, 512×512": Network(
        partial(
            *(UNet, 64, (0.5, 1, 1, 2, 2, 4, 4), 1, (32, 64)),
            heads=None,
            head_channels=32,
            updown=True,
        ),
        "--image_size 512 --num_channels 64 --num_res_blocks 1 --num_head_channels 32 "
        "--attention_resolutions 16,8 --resblock_updown True",
        shape=(1, 64, 64, 3),
    ),
}


def _classifier(pool: str, plain: bool = False) -> Network:
    """`plain`: neither scale and shift nor resampling residual blocks."""
    flags = f"--image_size 64 --classifier_width 64 --classifier_depth 1 --classifier_pool {pool}"
    make = partial(Classifier, 64, 64, (1, 2, 3, 4), 1, (2, 4, 8), pool=pool)
    if plain:
        flags += " --classifier_use_scale_shift_norm False --classifier_resblock_updown False"
        make = partial(make, scale_shift=False, updown=False)
    return Network(make, flags, (2, 64, 64, 3))


CLASSIFIERS = {
    "attention": _classifier("attention"),
    "adaptive": _classifier("adaptive", plain=True),
    "spatial": _classifier("spatial"),
    "spatial_v2": _classifier("spatial_v2"),
}
