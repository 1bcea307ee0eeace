"""The networks of OpenAI's guided-diffusion and improved-diffusion (Dhariwal & Nichol 2021; Nichol
& Dhariwal 2021), from their state dicts and the flags that their READMEs print.
"""

import os
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.interop.openai_flags import Flags, flag_error, is_default, numbers, read_flags
from jax_ddpm.interop.openai_weights import classifier_from_openai, unet_from_openai
from jax_ddpm.interop.tensors import read_state_dict
from jax_ddpm.models import NoisyClassifier, UNet
from jax_ddpm.schedule import (
    NoiseSchedule,
    cosine_beta_schedule,
    linear_beta_schedule,
    make_schedule,
    spaced_timesteps,
)

_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}


def load_openai(
    weights: str | os.PathLike[str] | Mapping[str, Any], flags: Flags
) -> DiffusionModel:
    """Open a diffusion model of guided-diffusion or improved-diffusion.

    `model.apply(variables, x, t[, y])` takes the original training timestep. Weights keep their
    dtype. The network computes in the dtype of the images, whatever `use_fp16` says;
    `model.clone(dtype=…)` changes that. `chain()` is the one that `timestep_respacing` names,
    `chain("ddim25")` another. Fixed variances are `"fixed_large"`, as in OpenAI's code.

    The variables are read-only views of the mapped file: leave it as it is while they are in use,
    or copy them, `jax.tree.map(np.array, variables)`.

    Args:
      weights: their state dict: a `.safetensors`, a `.pt` (read by torch where it is installed), or
        tensors by name.
      flags: their MODEL_FLAGS and DIFFUSION_FLAGS, as one string or by name; those of a classifier
        may stand among them. What is left out has the default of guided-diffusion. One default
        differs: where no flag is of guided-diffusion alone (`num_head_channels`, `channel_mult`,
        `resblock_updown`, `use_new_attention_order`, a classifier's), `rescale_timesteps` is True,
        as in improved-diffusion. It matters where `diffusion_steps` is not 1,000. Some flags leave
        no trace in the file, so that a wrong one gives wrong pictures and no error: `num_heads`,
        `num_head_channels`, `use_new_attention_order`, `predict_xstart` and all of the diffusion.

    Raises:
      ValueError: a flag is unknown or has no such value; the file contradicts a flag; a tensor is
        missing, unknown or misshapen. The message names it.
      ImportError: `weights` is a `.pt` and torch is not installed.
    """
    settings = read_flags(flags)
    tensors = read_state_dict(weights)
    model = _unet(settings, tensors)
    order = "kind" if settings["use_new_attention_order"] else "head"
    variables = _named(weights, unet_from_openai, tensors, model, order=order)
    variance_type = "fixed_small" if settings["sigma_small"] else "fixed_large"
    schedule = _schedule(settings)
    try:
        spaced_timesteps(schedule.num_timesteps, settings["timestep_respacing"])
    except ValueError as error:
        raise flag_error("timestep_respacing", str(error)) from None
    return DiffusionModel(
        model,
        variables,
        schedule,
        (settings["image_size"], settings["image_size"], 3),
        prediction_type="sample" if settings["predict_xstart"] else "epsilon",
        variance_type="learned_range" if settings["learn_sigma"] else variance_type,
        clip_denoised=settings["clip_denoised"],
        timestep_spacing="linspace",
        num_classes=model.num_class_embeds,
        timestep_respacing=settings["timestep_respacing"],
    )


def load_openai_classifier(
    weights: str | os.PathLike[str] | Mapping[str, Any], flags: Flags
) -> tuple[NoisyClassifier, dict[str, Any]]:
    """Open a classifier of guided-diffusion: the module, and its variables.

    `model.apply(variables, x, t)` gives logits, for `classifier_guidance`. `weights` and what is
    raised are as of `load_openai`; `flags` are their CLASSIFIER_FLAGS, those of the diffusion may
    stand among them. `classifier_scale` is the caller's to pass on, as `scale`.
    """
    settings = read_flags(flags)
    tensors = read_state_dict(weights)
    model = _classifier(settings, tensors)
    return model, _named(weights, classifier_from_openai, tensors, model)


def _named(weights: Any, convert: Any, *arguments: Any, **keywords: Any) -> dict[str, Any]:
    """What `convert` gives; what it raises names the file, and the flags that it follows from."""
    try:
        return convert(*arguments, **keywords)
    except ValueError as error:
        where = "" if isinstance(weights, Mapping) else f"{os.fspath(weights)}: "
        shape = "image_size, channel_mult, num_res_blocks and attention_resolutions"
        raise ValueError(f"{where}{error}; the flags that decide it: {shape}") from None


def _schedule(settings: Mapping[str, Any]) -> NoiseSchedule:
    steps = settings["diffusion_steps"]
    if settings["noise_schedule"] == "cosine":
        return make_schedule(cosine_beta_schedule(steps))
    scale = 1000 / steps
    try:
        return make_schedule(linear_beta_schedule(steps, scale * 1e-4, scale * 0.02))
    except ValueError as error:
        raise flag_error("diffusion_steps", f"{steps} is too few: {error}") from None


class _Levels(NamedTuple):
    channels: tuple[int, ...]
    attention: tuple[bool, ...]

    def kinds(self, plain: str, attention: str) -> tuple[str, ...]:
        return tuple(attention if attends else plain for attends in self.attention)


def _levels(
    size: int, width: int, resolutions: tuple[int, ...], multipliers: tuple[float | int, ...]
) -> _Levels:
    """The channels of each resolution, and whether it has attention."""
    halvings = [size // resolution for resolution in resolutions]
    attention = tuple(2**level in halvings for level in range(len(multipliers)))
    return _Levels(tuple(int(each * width) for each in multipliers), attention)


def _multipliers(settings: Mapping[str, Any]) -> tuple[float | int, ...]:
    if settings["channel_mult"]:
        return numbers(settings, "channel_mult", float)
    size = settings["image_size"]
    if size not in _CHANNEL_MULT:
        known = ", ".join(map(str, _CHANNEL_MULT))
        raise flag_error("image_size", f"expected one of {known} without channel_mult, got {size}")
    return _CHANNEL_MULT[size]


def _unet(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> UNet:
    size, width = settings["image_size"], settings["num_channels"]
    labels = tensors.get("label_emb.weight")
    _check_file(
        tensors,
        num_channels=width,
        learn_sigma=settings["learn_sigma"],
        class_cond=settings["class_cond"],
        use_scale_shift_norm=settings["use_scale_shift_norm"],
        resblock_updown=settings["resblock_updown"],
    )
    resolutions = numbers(settings, "attention_resolutions", int)
    levels = _levels(size, width, resolutions, _multipliers(settings))
    resampling = "resnet" if settings["resblock_updown"] else "conv"
    plain = "ResnetDownsampleBlock2D" if settings["resblock_updown"] else "DownBlock2D"
    plain_up = "ResnetUpsampleBlock2D" if settings["resblock_updown"] else "UpBlock2D"
    return UNet(
        sample_size=size,
        out_channels=6 if settings["learn_sigma"] else 3,
        block_out_channels=levels.channels,
        down_block_types=levels.kinds(plain, "AttnDownBlock2D"),
        up_block_types=levels.kinds(plain_up, "AttnUpBlock2D")[::-1],
        layers_per_block=settings["num_res_blocks"],
        **_heads(settings, levels),
        norm_eps=1e-5,
        attn_norm_num_groups=32,
        resnet_time_scale_shift="scale_shift" if settings["use_scale_shift_norm"] else "default",
        downsample_padding=1,
        downsample_type=resampling,
        upsample_type=resampling,
        dropout=settings["dropout"],
        **_time(width, levels),
        time_scale=1000 / settings["diffusion_steps"] if settings["rescale_timesteps"] else 1,
        flip_sin_to_cos=True,
        freq_shift=0,
        num_class_embeds=None if labels is None else labels.shape[0],
        remat=settings["use_checkpoint"],
    )


def _time(width: int, levels: _Levels) -> dict[str, Any]:
    """The features of the time, where they do not follow from the first channels."""
    if width == levels.channels[0]:
        return {}
    return {"time_proj_dim": width, "time_embedding_dim": 4 * width}


def _heads(settings: Mapping[str, Any], levels: _Levels) -> dict[str, Any]:
    """The heads, as channels of each where one number says it: diffusers has no other word."""
    pairs = zip(levels.channels, levels.attention, strict=True)
    attended = {channels for channels, attends in pairs if attends} | {levels.channels[-1]}
    head_dim = settings["num_head_channels"]
    used = ("num_heads", "num_heads_upsample") if head_dim == -1 else ("num_head_channels",)
    for name in used:
        if settings[name] != -1 and any(channels % settings[name] for channels in attended):
            channels = ", ".join(map(str, sorted(attended)))
            raise flag_error(name, f"expected a divisor of {channels}, got {settings[name]}")
    if head_dim != -1:
        return {"attention_head_dim": head_dim}
    heads, upward = settings["num_heads"], settings["num_heads_upsample"]
    upward = heads if upward == -1 else upward
    if heads != upward:
        return {"num_attention_heads": heads, "num_attention_heads_upsample": upward}
    if len(attended) == 1:
        return {"attention_head_dim": min(attended) // heads}
    return {"num_attention_heads": heads}


def _classifier(settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> NoisyClassifier:
    size, width = settings["image_size"], settings["classifier_width"]
    resnets = settings["classifier_resblock_updown"]
    scale_shift = settings["classifier_use_scale_shift_norm"]
    _check_file(
        tensors,
        classifier_width=width,
        classifier_use_scale_shift_norm=scale_shift,
        classifier_resblock_updown=resnets,
    )
    resolutions = numbers(settings, "classifier_attention_resolutions", int)
    levels = _levels(size, width, resolutions, _multipliers({**settings, "channel_mult": ""}))
    plain = "ResnetDownsampleBlock2D" if resnets else "DownBlock2D"
    return NoisyClassifier(
        sample_size=size,
        block_out_channels=levels.channels,
        down_block_types=levels.kinds(plain, "AttnDownBlock2D"),
        layers_per_block=settings["classifier_depth"],
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        downsample_type="resnet" if resnets else "conv",
        **_time(width, levels),
        pool=settings["classifier_pool"],
    )


def _check_file(tensors: Mapping[str, np.ndarray], **flags: Any) -> None:
    """Raises `ValueError` naming the first flag that the file contradicts, where it shows."""
    shapes = {name: value.shape for name, value in tensors.items()}
    try:
        width = shapes["time_embed.0.weight"][1]
        image_channels = shapes["input_blocks.0.0.weight"][1]
        time_features = shapes["input_blocks.1.0.emb_layers.1.weight"][0]
        features = shapes["input_blocks.1.0.out_layers.0.weight"][0]
    except (KeyError, IndexError):
        return  # whose network it is, the names of its tensors will tell
    if image_channels == 6:
        raise ValueError(
            "weights: expected a network that sees 3 channels, got one that sees 6: it enlarges "
            "images, which is not supported"
        )
    found = {
        "num_channels": width,
        "width": width,
        "class_cond": "label_emb.weight" in shapes,
        "use_scale_shift_norm": time_features == 2 * features,
    }
    if any(".op." in name for name in shapes):
        found["resblock_updown"] = False
    elif any(re.match(r"output_blocks\.\d+\.[12]\.in_layers", name) for name in shapes):
        found["resblock_updown"] = True
    if "out.2.weight" in shapes:
        found["learn_sigma"] = shapes["out.2.weight"][0] == 6
    for name, value in flags.items():
        there = found.get(name.removeprefix("classifier_"), value)
        if there != value:
            default = " (the default)" if is_default(name, value) else ""
            raise flag_error(name, f"expected {there}, as in weights, got {value}{default}")
