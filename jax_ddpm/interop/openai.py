"""The networks of OpenAI's guided-diffusion and improved-diffusion (Dhariwal & Nichol 2021; Nichol
& Dhariwal 2021), from their state dicts and the flags in their READMEs.

`qkv` holds query, key and value of the first head, then of the next, or, with
`use_new_attention_order`, all queries, then all keys, then all values.
"""

import argparse
import re
import shlex
import warnings
from collections.abc import Mapping
from itertools import chain, compress
from typing import Any

import numpy as np

from jax_ddpm._errors import FieldError, suggestion
from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.interop.torch import LEAVES, Variables, Weights, read_state_dict, variables_from
from jax_ddpm.models import NoisyClassifier, UNet, adm_imagenet64
from jax_ddpm.schedule import cosine_beta_schedule, linear_beta_schedule, make_schedule

Flags = str | Mapping[str, Any]

# guided-diffusion's defaults, and so the types.
_DEFAULTS: dict[str, Any] = {
    **{"image_size": 64, "num_channels": 128, "num_res_blocks": 2, "channel_mult": ()},
    **{"num_heads": 4, "num_heads_upsample": -1, "num_head_channels": -1},
    **{"attention_resolutions": (16, 8), "use_scale_shift_norm": True, "class_cond": False},
    **dict.fromkeys(("resblock_updown", "use_new_attention_order", "use_checkpoint"), False),
    **{"dropout": 0.0, "diffusion_steps": 1000, "noise_schedule": "linear"},
    **{"timestep_respacing": "", "clip_denoised": True},
    **dict.fromkeys(("learn_sigma", "sigma_small", "predict_xstart", "rescale_timesteps"), False),
    **{"classifier_width": 128, "classifier_depth": 2, "classifier_pool": "attention"},
    **{"classifier_attention_resolutions": (32, 16, 8), "classifier_scale": 1.0},
    **{"classifier_use_scale_shift_norm": True, "classifier_resblock_updown": True},
    # How it was trained, which changes nothing here.
    **dict.fromkeys(("use_fp16", "classifier_use_fp16", "use_kl", "rescale_learned_sigmas"), False),
}
_GUIDED_ONLY = ("classifier_", "num_head_channels", "channel_mult", "resblock_updown")
_GUIDED_ONLY += ("use_new_attention_order",)
# What their scripts take beside the network's and the diffusion's.
_ASIDE = (
    *("anneal_lr", "base_samples", "batch_size", "classifier_path", "data_dir", "ema_rate"),
    *("eval_interval", "fp16_scale_growth", "iterations", "log_interval", "lr", "lr_anneal_steps"),
    *("microbatch", "model_path", "noised", "num_samples", "resume_checkpoint", "save_interval"),
    *("schedule_sampler", "use_ddim", "val_data_dir", "weight_decay"),
)
_CHANNEL_MULT = {
    512: (0.5, 1, 1, 2, 2, 4, 4),
    256: (1, 1, 2, 2, 4, 4),
    128: (1, 1, 2, 3, 4),
    64: (1, 2, 3, 4),
    32: (1, 2, 2, 2),
}

_TOP = {
    **{"time_embedding/linear_1": "time_embed.0", "time_embedding/linear_2": "time_embed.2"},
    **{"class_embedding": "label_emb", "conv_in": "input_blocks.0.0"},
    **{"conv_norm_out": "out.0", "conv_out": "out.2"},
}
_POOLS = {
    "attention": {"norm_out": "out.0", "out": "out.2", "out/to_out": "out.2.c_proj"}
    | {f"out/to_{each}": "out.2.qkv_proj" for each in "qkv"},
    "adaptive": {"norm_out": "out.0", "out": "out.3"},
    "spatial": {"hidden": "out.0", "out": "out.2"},
    "spatial_v2": {"hidden": "out.0", "norm_out": "out.1", "out": "out.3"},
}
_CHOICES = {"noise_schedule": ("linear", "cosine"), "classifier_pool": tuple(_POOLS)}
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:_(\d+))?/([a-z]+)_(\d+)/(\w+)")
_IN_BLOCK = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
    **{"group_norm": "norm", "to_q": "qkv", "to_k": "qkv", "to_v": "qkv", "to_out_0": "proj_out"},
}


def load_openai(weights: Weights, flags: Flags) -> DiffusionModel:
    """Read a diffusion model of OpenAI's guided-diffusion or improved-diffusion.

    Its network computes in the dtype of the images, whatever `use_fp16` says (`clone(dtype=…)`
    changes that). The variables are read-only views of the file, as in `load_diffusers`. Fixed
    variances are `"fixed_large"`, as in OpenAI's code; `chain()` is that of `timestep_respacing`.

    Args:
      weights: a state dict: a `.safetensors`, a `.pt` (read by torch), or tensors by name.
      flags: MODEL_FLAGS and DIFFUSION_FLAGS, as one string or by name; those of a classifier may
        stand among them. The defaults are guided-diffusion's, but `rescale_timesteps` is True, as
        in improved-diffusion, if no flag is of guided-diffusion alone (a classifier's,
        `num_head_channels`, `channel_mult`, `resblock_updown`, `use_new_attention_order`). Some
        leave no trace in the file, so a wrong value gives wrong images and no error: `num_heads`,
        `num_head_channels`, `use_new_attention_order`, `predict_xstart`, those of the diffusion.

    Raises:
      ValueError: a flag or a tensor is missing, unknown or wrong; the message names it.
      ImportError: a `.pt` without torch.
    """
    given = _read_flags(flags)
    tensors = read_state_dict(weights)
    network = _unet(given, len(tensors.get("label_emb.weight", range(1000))))
    variables = _variables(tensors, network, given.use_new_attention_order)
    steps, respacing = given.diffusion_steps, given.timestep_respacing
    variance_type = "fixed_small" if given.sigma_small else "fixed_large"
    try:
        if given.noise_schedule == "cosine":
            betas = cosine_beta_schedule(steps)
        else:
            betas = linear_beta_schedule(steps, 1000 / steps * 1e-4, 1000 / steps * 0.02)
        model = DiffusionModel(
            network,
            variables,
            make_schedule(betas),
            (given.image_size, given.image_size, 3),
            prediction_type="sample" if given.predict_xstart else "epsilon",
            variance_type="learned_range" if given.learn_sigma else variance_type,
            clip_denoised=given.clip_denoised,
            timestep_spacing="linspace",
            timestep_respacing=respacing,
            num_classes=network.num_class_embeds,
        )
        model.chain()
    except ValueError as error:
        wrong = f"diffusion_steps {steps}, timestep_respacing {respacing!r}"
        raise FieldError("flags", f"{wrong}: {error}") from None
    return model


def load_openai_classifier(weights: Weights, flags: Flags) -> tuple[NoisyClassifier, Variables]:
    """Read a noisy classifier of OpenAI's guided-diffusion, for `classifier_guidance`.

    Args:
      weights: a state dict, as in `load_openai`, with the same errors.
      flags: CLASSIFIER_FLAGS, and perhaps others. Pass `classifier_scale` on, as `scale`.

    Returns:
      The module and its variables: `module.apply(variables, x_t, t)` is the logits.
    """
    given = _read_flags(flags)
    down = (given.classifier_attention_resolutions, given.classifier_resblock_updown)
    fields = _shared_fields(
        given.image_size, given.classifier_width, (), *down, given.classifier_use_scale_shift_norm
    )
    depth, pool = given.classifier_depth, given.classifier_pool
    network = NoisyClassifier(**fields, layers_per_block=depth, pool=pool)
    return network, _variables(read_state_dict(weights), network, False)


def _read_flags(flags: Flags) -> argparse.Namespace:
    """All flags, typed as their defaults. Raises `FieldError` naming one that does not fit."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, default in (_DEFAULTS | dict.fromkeys(_ASIDE)).items():
        kind = {bool: boolean, tuple: numbers, type(None): str}.get(type(default), type(default))
        choices = _CHOICES.get(name)
        parser.add_argument(f"--{name}", type=kind, default=default, choices=choices)
    try:
        words = _words(flags)
        names = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        guided = any(name.startswith(_GUIDED_ONLY) for name in names & _DEFAULTS.keys())
        parser.set_defaults(rescale_timesteps=not guided)
        given, others = parser.parse_known_args(words)
    except (argparse.ArgumentError, ValueError) as error:
        raise FieldError("flags", str(error).removeprefix("argument --")) from None
    if others:
        name = others[0].lstrip("-").partition("=")[0]
        hint = suggestion(name, _DEFAULTS)
        if name in ("large_size", "small_size"):
            hint = ", of a network that enlarges images (not supported)"
        raise FieldError("flags", f"expected the model's and the diffusion's, got {name}{hint}")
    if aside := [name for name in _ASIDE if getattr(given, name) is not None]:
        warnings.warn(f"flags: left aside, not of the network: {', '.join(aside)}", stacklevel=3)
    for name, value in vars(given).items():
        if type(value) is int and value < 1 and value != _DEFAULTS[name]:
            raise FieldError("flags", f"{name}: expected more than 0, got {value}")
    return given


def _words(flags: Flags) -> list[str]:
    """The words of flags by name, or in a script: `FLAGS="…"`, `python x.py $FLAGS --…`."""
    if not isinstance(flags, str):
        return [f"--{name}={value}" for name, value in flags.items()]
    text = re.sub(r"\\\s*\n", " ", flags)
    text = re.sub(r"(?:export\s+)?\b\w*FLAGS=(['\"])(.*?)\1;?", r"\2", text, flags=re.DOTALL)
    text = re.sub(r"(?:\w+=\S*\s+)*\b(?:mpiexec|mpirun|torchrun|python)\b.*?\.py\b", " ", text)
    return shlex.split(re.sub(r"\$\{?\w+\}?", " ", text), comments=True)


def boolean(word: str) -> bool:
    """argparse shows this function's name in its messages."""
    no, yes = ("no", "false", "f", "n", "0"), ("yes", "true", "t", "y", "1")
    return (no + yes).index(word.lower()) >= len(no)


def numbers(word: str) -> tuple[float, ...]:
    """Numbers between commas, in brackets or not."""
    word = word.strip("()[], ")
    found = tuple(map(float, word.split(","))) if word else ()
    if not all(each > 0 for each in found):
        raise ValueError
    return found


def _unet(given: argparse.Namespace, num_classes: int) -> UNet:
    down = (given.attention_resolutions, given.resblock_updown, given.use_scale_shift_norm)
    fields = _shared_fields(given.image_size, given.num_channels, given.channel_mult, *down)
    channels, kinds = fields["block_out_channels"], fields["down_block_types"]
    numbers = (given.num_heads, given.num_heads_upsample, given.num_head_channels)
    heads, upward, head_dim = (None if number == -1 else number for number in numbers)
    attended = {channels[-1], *compress(channels, ("Attn" in kind for kind in kinds))}
    uniform = len(attended) == 1 and channels[-1] % (heads or 1) == 0 and upward in (None, heads)
    if head_dim is None and uniform:
        head_dim = channels[-1] // heads  # all that diffusers has a word for
    return adm_imagenet64(  # whose other fields all of theirs have
        **fields,
        attention_head_dim=head_dim,
        num_attention_heads=None if head_dim else heads,
        num_attention_heads_upsample=None if head_dim or upward == heads else upward,
        out_channels=6 if given.learn_sigma else 3,
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        layers_per_block=given.num_res_blocks,
        upsample_type=fields["downsample_type"],
        dropout=given.dropout,
        time_scale=1000 / given.diffusion_steps if given.rescale_timesteps else 1,
        num_class_embeds=num_classes if given.class_cond else None,
        remat=given.use_checkpoint,
    )


def _shared_fields(
    size: int, width: int, multipliers: tuple, attended: tuple, updown: bool, scale_shift: bool
) -> dict[str, Any]:
    """Fields that the U-Net and the classifier have in common."""
    if not multipliers and size not in _CHANNEL_MULT:
        raise FieldError("flags", f"image_size: expected one of {[*_CHANNEL_MULT]}, got {size}")
    channels = tuple(int(each * width) for each in multipliers or _CHANNEL_MULT[size])
    halvings = [size // each for each in attended]
    plain = "ResnetDownsampleBlock2D" if updown else "DownBlock2D"
    kinds = ("AttnDownBlock2D" if 2**i in halvings else plain for i in range(len(channels)))
    own = {} if width == channels[0] else {"time_proj_dim": width, "time_embedding_dim": 4 * width}
    return own | {
        "sample_size": size,
        "block_out_channels": channels,
        "down_block_types": tuple(kinds),
        "downsample_type": "resnet" if updown else "conv",
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
    }


def _variables(
    tensors: Mapping[str, np.ndarray], network: UNet | NoisyClassifier, new_order: bool
) -> Variables:
    """Variables of `network`. Raises `ValueError` naming a tensor that does not fit."""
    network.check_fields()
    heads = {each.name: each.features // each.head_dim for each in chain(*network.levels())}

    def part_of(path: str, tensor: np.ndarray) -> np.ndarray:
        """The query, key or value in `qkv`."""
        if not (match := re.search("/to_([qkv])/", path)):
            return tensor
        # The classifier's pool has the new order.
        groups = 1 if new_order or path.startswith("out/") else heads[path.partition("/")[0]]
        parts = tensor.reshape(groups, 3, -1, *tensor.shape[1:])
        return parts[:, "qkv".index(match[1])].reshape(-1, *tensor.shape[1:])

    dense = {}  # some are convolutions of one pixel there, as the shortcuts are here too
    for name, tensor in tensors.items():
        one_pixel = set(tensor.shape[2:]) == {1} and "skip_connection" not in name
        dense[name] = tensor.reshape(tensor.shape[:2]) if one_pixel else tensor
    try:
        return variables_from(dense, network, lambda path: _openai_name(path, network), part_of)
    except ValueError as error:
        flags = "attention_resolutions, resblock_updown, use_scale_shift_norm, image_size"
        if isinstance(network, UNet):
            flags += ", num_channels, channel_mult, num_res_blocks, class_cond, learn_sigma"
            flags += ", num_heads, num_head_channels"
        raise ValueError(f"{error}; the flags that decide it: {flags}") from None


def _openai_name(path: str, network: UNet | NoisyClassifier) -> str:
    """OpenAI's name of the parameter at `path`."""
    module, _, leaf = path.rpartition("/")
    leaf = (LEAVES | {"positions": "positional_embedding"})[leaf]
    if not (match := _BLOCK.fullmatch(module)):
        top = _TOP if isinstance(network, UNet) else _TOP | _POOLS[network.pool]
        return f"{top[module]}.{leaf}"
    way, level, kind, layer, inside = match.groups()
    layers, place = network.layers_per_block, int(kind == "attentions")
    inside = _IN_BLOCK.get(inside, "op" if way == "down" else "conv")
    if way == "mid":
        return f"middle_block.{place or 2 * int(layer)}.{inside}.{leaf}"
    if kind.endswith("samplers"):
        layer = layers
    if kind == "upsamplers":  # in the block of the last layer, behind its attention
        place = 1 + network.up_block_types[int(level)].startswith("Attn")  # pyright: ignore
    # The first block on the way down is `conv_in`; then come layers + 1 blocks a level, each way.
    block = int(level) * (layers + 1) + int(layer) + (way == "down")
    return f"{'input' if way == 'down' else 'output'}_blocks.{block}.{place}.{inside}.{leaf}"
