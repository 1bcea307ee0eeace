"""Cases for the U-Net: diffusers' own `UNet2DModel`, in the shapes that its config can take."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import jax_ddpm as ddpm
from jax_ddpm.interop import unet_from_torch, unet_to_torch
from jax_ddpm.parity.compare import Pair
from jax_ddpm.parity.harness import (
    Case,
    DType,
    from_torch,
    images,
    schedule,
    timesteps,
    to_torch,
    vector,
)
from torch_reference.forward import q_sample
from torch_reference.schedule import tables

_TIMESTEPS, _ADAM_STEPS, _DDIM_STEPS = 1000, 10, 50
_SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
_LABELS = {**_SMALL, "num_class_embeds": 5}
_ONE_LEVEL = {
    **_LABELS,
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
_LEARNED = {**_SMALL, "out_channels": 6, "resnet_time_scale_shift": "scale_shift"}
CONFIGS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": _SMALL,
    "Ho et al.'s": {
        **_SMALL,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "layers_per_block": 2,
    },
    "learned variance, scale and shift": _LEARNED,
    "labels, three layers": {**_LABELS, "layers_per_block": 3},
    "odd channels, groups and heads": {
        **_SMALL,
        "block_out_channels": (15, 45),
        "norm_num_groups": 5,
        "attention_head_dim": 7,
        "act_fn": "gelu",
        "mid_block_scale_factor": 1.4,
        "center_input_sample": True,
    },
    "attention at every level": {
        **_SMALL,
        "block_out_channels": (8, 8, 24),
        "down_block_types": ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3,
        "act_fn": "mish",
        "time_embedding_dim": 24,
        "attn_norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
    },
    "no attention, no middle": {
        **_SMALL,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None,
        "act_fn": "relu",
    },
    "no attention in the middle": {**_SMALL, "add_attention": False},
    "heads wider than the first level": {**_SMALL, "attention_head_dim": 32},
    "Dhariwal & Nichol's": {
        **_SMALL,
        "out_channels": 6,
        "block_out_channels": (16, 24, 32),
        "down_block_types": ("ResnetDownsampleBlock2D", *("AttnDownBlock2D",) * 2),
        "up_block_types": (*("AttnUpBlock2D",) * 2, "ResnetUpsampleBlock2D"),
        "attention_head_dim": 8,
        "attn_norm_num_groups": 8,
        "resnet_time_scale_shift": "scale_shift",
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "num_class_embeds": 5,
    },
    # `upsample_type` has no say in blocks without attention.
    "residual and other resampling": {
        **_SMALL,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("ResnetUpsampleBlock2D", "UpBlock2D", "AttnUpBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
    },
}
CIFAR10 = {
    **CONFIGS["Ho et al.'s"],
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
}


class _Float64Timesteps(torch.nn.Module):
    """diffusers computes the sinusoids in float32 whatever the model's dtype, which alone puts a
    float64 output 1e-8 off. Here they are, in float64."""

    def __init__(self, features: int, flip_sin_to_cos: bool, freq_shift: int) -> None:
        super().__init__()
        self.features, self.flip, self.shift = features, flip_sin_to_cos, freq_shift

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = self.features // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - self.shift)
        angles = torch.outer(t.double(), 1e-4**exponents)
        waves = [angles.sin(), angles.cos()]
        padding = angles.new_zeros(len(t), self.features % 2)
        return torch.cat([*(reversed(waves) if self.flip else waves), padding], dim=1)


def reference_unet(config: dict[str, Any], dtype: DType) -> UNet2DModel:
    """A randomly initialised `UNet2DModel`; the same numbers at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = UNet2DModel(**config)
    if dtype == "float64":
        said = network.config
        network.time_proj = _Float64Timesteps(
            said.block_out_channels[0], said.flip_sin_to_cos, said.freq_shift
        )
    torch.nn.Module.to(network, getattr(torch, dtype))  # diffusers' own `to` logs a warning
    return network.eval()


def _pair(config: dict[str, Any], shape: tuple[int, ...], dtype: DType) -> Pair:
    """diffusers' network and this library's, on images, steps and, where it has them, labels."""
    network = reference_unet(config, dtype)
    said = {name: tuple(v) if isinstance(v, list) else v for name, v in network.config.items()}
    fields: Any = {name: said[name] for name in ddpm.UNet.__dataclass_fields__ if name in said}
    model = ddpm.UNet(**fields, precision="highest")
    inputs = [images(0, dtype, shape), timesteps(_TIMESTEPS, shape[0])]
    if classes := config.get("num_class_embeds"):
        inputs.append(np.arange(shape[0], dtype=np.int32) % classes)
    return Pair(
        network,
        model.apply,
        partial(unet_from_torch, model=model),
        inputs,
        dtype,
        torch_fn=lambda network, x, t, y=None: network(x, t, class_labels=y).sample,
    )


def _gradients(pair: Pair) -> tuple[Any, Any]:
    """As one vector: a bias before a softmax has no gradient but rounding, and no scale."""
    ours, theirs = pair.gradients()
    return vector(ours), vector(theirs)


def _training(pair: Pair) -> tuple[Any, Any]:
    """AdamW on the ε loss, with noise of its own at each step."""
    x_start, t, *rest = pair.inputs
    draws = []
    for number in range(_ADAM_STEPS):
        noise = images(1 + number, pair.dtype, x_start.shape)
        exact = (to_torch(each, "float64") for each in (x_start, t, noise))
        x_t = from_torch(q_sample(tables(torch.float64, _TIMESTEPS), *exact))
        draws.append(((x_t.astype(pair.dtype), t, *rest), noise))
    # ε of 1e-5: by default Adam makes a whole step of a gradient that is only rounding.
    return pair.training(
        optax.adamw(1e-4, eps=1e-5, weight_decay=0.01),
        partial(torch.optim.AdamW, lr=1e-4, eps=1e-5, weight_decay=0.01),
        draws,
    )


def _ddim(pair: Pair) -> tuple[Any, Any]:
    """diffusers' network under diffusers' scheduler, its tables replaced by float64 ones."""
    chain = ddpm.respace(schedule(_TIMESTEPS), ddpm.spaced_timesteps(_TIMESTEPS, _DDIM_STEPS))
    x_T = pair.inputs[0]

    @jax.jit
    def loop(variables, x_T):
        def denoise_fn(x, t):
            return pair.apply(variables, x, t)

        return ddpm.p_sample_loop(None, chain, denoise_fn, x_T.shape, sampler=ddpm.ddim(), x_T=x_T)

    scheduler: Any = DDIMScheduler(_TIMESTEPS, 1e-4, 0.02, clip_sample=True)
    scheduler.alphas_cumprod = tables(torch.float64, _TIMESTEPS).alphas_cumprod
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(_DDIM_STEPS)
    x = to_torch(x_T)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = pair.call(pair.module, x, t)
            x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    return loop(pair.variables, x_T), from_torch(x)


def _case(
    kind: str,
    name: str,
    compare: Callable[[Pair], tuple[Any, Any]],
    config: dict[str, Any],
    shape: tuple[int, ...] = (2, 8, 8, 3),
) -> Case:
    return Case(kind, f"UNet, {name}", lambda dtype: compare(_pair(config, shape, dtype)))


_ROUND_TRIP = partial(Pair.round_trip, variables_to_torch=unet_to_torch)
_LARGE = (CIFAR10, (1, 32, 32, 3))
UNET_CASES = (
    *(
        _case("unet", f"{name}: output", Pair.outputs, config, (3, 8, 12, 3))
        for name, config in CONFIGS.items()
    ),
    *(
        _case("weights", f"{name}: torch → Flax → torch", _ROUND_TRIP, CONFIGS[name])
        for name in ("diffusers' defaults", "odd channels, groups and heads")
    ),
    *(
        _case("unet gradients", f"{name}: gradient of every parameter", _gradients, config)
        for name, config in (("learned variance, scale and shift", _LEARNED), ("labels", _LABELS))
    ),
    _case(
        "training",
        f"labels, one level: {_ADAM_STEPS} AdamW steps: weights, losses",
        _training,
        _ONE_LEVEL,
    ),
    _case("unet", "35.7 M parameters: output", Pair.outputs, *_LARGE),
    _case("unet chain", f"35.7 M parameters: {_DDIM_STEPS} steps of DDIM", _ddim, *_LARGE),
)
