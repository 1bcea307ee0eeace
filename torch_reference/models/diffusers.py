"""diffusers' `UNet2DModel` in the shapes that its config can take, with sinusoids in float64."""

from typing import Any

import torch


def unet_config(
    channels: tuple[int, ...] = (16, 32),
    down: tuple[str, ...] = ("Down", "AttnDown"),
    up: tuple[str, ...] = ("AttnUp", "Up"),
    **fields: Any,
) -> dict[str, Any]:
    """The keywords of a `UNet2DModel`, by default a small one."""
    down, up = (tuple(f"{kind}Block2D" for kind in kinds) for kinds in (down, up))
    blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    return {**blocks, "norm_num_groups": 8, "layers_per_block": 1, **fields}


LABELS: dict[str, Any] = {"num_class_embeds": 5}
_SCALE_SHIFT: dict[str, Any] = {"resnet_time_scale_shift": "scale_shift"}
LEARNED = unet_config(out_channels=6, **_SCALE_SHIFT)
_RESNET: dict[str, Any] = {"downsample_type": "resnet", "upsample_type": "resnet"}
_HO: dict[str, Any] = {
    "attention_head_dim": None,
    "downsample_padding": 0,
    "layers_per_block": 2,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": unet_config(),
    "Ho et al.'s": unet_config(**_HO),
    "learned variance, scale and shift": LEARNED,
    "labels, three layers": unet_config(layers_per_block=3, **LABELS),
    "odd channels, groups and heads": unet_config(
        (15, 45),
        norm_num_groups=5,
        attention_head_dim=7,
        act_fn="gelu",
        mid_block_scale_factor=1.4,
        center_input_sample=True,
    ),
    "attention at every level": unet_config(
        (8, 8, 24),
        ("AttnDown",) * 3,
        ("AttnUp",) * 3,
        act_fn="mish",
        time_embedding_dim=24,
        attn_norm_num_groups=4,
        **_SCALE_SHIFT,
    ),
    "no attention, no middle": unet_config(
        down=("Down", "Down"), up=("Up", "Up"), mid_block_type=None, act_fn="relu"
    ),
    "no attention in the middle": unet_config(add_attention=False),
    "heads wider than the first level": unet_config(attention_head_dim=32),
    "Dhariwal & Nichol's": unet_config(
        (16, 24, 32),
        ("ResnetDownsample", "AttnDown", "AttnDown"),
        ("AttnUp", "AttnUp", "ResnetUpsample"),
        out_channels=6,
        attention_head_dim=8,
        attn_norm_num_groups=8,
        **_SCALE_SHIFT,
        **_RESNET,
        **LABELS,
    ),
    # `upsample_type` has no say in blocks without attention.
    "residual and other resampling": unet_config(
        (8, 16, 24), ("AttnDown", "Down", "AttnDown"), ("ResnetUpsample", "Up", "AttnUp"), **_RESNET
    ),
}
CIFAR10 = unet_config(
    (128, 256, 256, 256),
    ("Down", "AttnDown", "Down", "Down"),
    ("Up", "Up", "AttnUp", "Up"),
    **{**_HO, "sample_size": 32, "norm_num_groups": 32},
)


class _Float64Timesteps(torch.nn.Module):
    """diffusers computes the sinusoids in float32 whatever the model's dtype, which alone puts a
    float64 output 1e-8 off. Here they are, in float64."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half, odd = divmod(self.config.block_out_channels[0], 2)
        exponents = torch.arange(half, dtype=torch.float64) / (half - self.config.freq_shift)
        angles = torch.outer(t.double(), 1e-4**exponents)
        waves = [angles.sin(), angles.cos()]
        ordered = reversed(waves) if self.config.flip_sin_to_cos else waves
        return torch.cat([*ordered, angles.new_zeros(len(t), odd)], dim=1)


def reference_unet(config: dict[str, Any], dtype: str) -> Any:
    """A randomly initialised `UNet2DModel`; the same numbers at every call."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = UNet2DModel(**config)
    if dtype == "float64":
        network.time_proj = _Float64Timesteps(network.config)
    torch.nn.Module.to(network, getattr(torch, dtype))  # diffusers' own `to` logs a warning
    return network.eval()
