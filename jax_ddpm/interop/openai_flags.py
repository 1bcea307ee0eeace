"""The flags of OpenAI's code, as their READMEs print them: names, defaults, types."""

import re
import shlex
import warnings
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from jax_ddpm._errors import FieldError

_BOTH: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "attention_resolutions": "16,8",
    "dropout": 0.0,
    "class_cond": False,
    "use_checkpoint": False,
    "use_scale_shift_norm": True,
    "use_fp16": False,  # improved-diffusion has it for training
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "timestep_respacing": "",
    "predict_xstart": False,
    "clip_denoised": True,
}
_GUIDED_ONLY: dict[str, Any] = {
    "num_head_channels": -1,
    "channel_mult": "",
    "resblock_updown": False,
    "use_new_attention_order": False,
}
_IMPROVED_ONLY: dict[str, Any] = {"sigma_small": False}
_CLASSIFIER: dict[str, Any] = {
    "classifier_width": 128,
    "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8",
    "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True,
    "classifier_pool": "attention",
    "classifier_use_fp16": False,
    "classifier_scale": 1.0,
}
_LOSS: dict[str, Any] = {"use_kl": False, "rescale_learned_sigmas": False}
"""How it was trained, which changes nothing in what it is."""
_ASIDE = {
    *("anneal_lr", "base_samples", "batch_size", "classifier_path", "data_dir", "ema_rate"),
    *("eval_interval", "fp16_scale_growth", "iterations", "log_interval", "lr", "lr_anneal_steps"),
    *("microbatch", "model_path", "noised", "num_samples", "resume_checkpoint", "save_interval"),
    *("schedule_sampler", "use_ddim", "val_data_dir", "weight_decay"),
}
"""What their scripts take beside the network's and the diffusion's."""
_RESCALED: dict[str, Any] = {"rescale_timesteps": False}
_DEFAULTS = _BOTH | _GUIDED_ONLY | _IMPROVED_ONLY | _CLASSIFIER | _LOSS | _RESCALED

_POOLS = ("attention", "adaptive", "spatial", "spatial_v2")
_KINDS = {int: "a whole number", float: "a number", str: "a word"}

Flags = str | Mapping[str, Any]


def read_flags(flags: Flags) -> dict[str, Any]:
    """All flags, typed as their defaults are. Raises `FieldError` naming one that does not fit.

    The two code bases differ in one default: improved-diffusion rescales timesteps.
    """
    given = dict(_words(flags) if isinstance(flags, str) else flags)
    if aside := sorted(_ASIDE & given.keys()):
        warnings.warn(f"flags: left aside, not of the network: {', '.join(aside)}", stacklevel=4)
        given = {name: value for name, value in given.items() if name not in _ASIDE}
    for name in sorted(given.keys() - _DEFAULTS.keys()):
        close = get_close_matches(name, _DEFAULTS, n=1, cutoff=0.8)
        hint = f"; did you mean {close[0]}?" if close else ""
        if name in ("large_size", "small_size"):
            hint = ", of a network that enlarges images (not supported)"
        raise FieldError("flags", f"expected those of model and diffusion, got {name}{hint}")
    typed = {name: _typed(name, value) for name, value in given.items()}
    for name, value in typed.items():
        _check_value(name, value)
    guided = (_GUIDED_ONLY | _CLASSIFIER).keys() & given.keys()
    return {**_DEFAULTS, "rescale_timesteps": not guided, **typed}


def _words(flags: str) -> Mapping[str, str]:
    """Of a string, or of a script's lines: `MODEL_FLAGS="…"`, `python x.py $MODEL_FLAGS --…`."""
    text = re.sub(r"\\\s*\n", " ", flags)
    text = re.sub(r"(?:export\s+)?\b\w*FLAGS=(['\"])(.*?)\1;?", r"\2", text, flags=re.DOTALL)
    text = re.sub(r"(?:\w+=\S+\s+)*\b(?:mpiexec|mpirun|torchrun|python)\b.*?\.py\b", " ", text)
    text = re.sub(r"\$\{?\w+\}?", " ", text)
    try:
        words = shlex.split(text.replace("=", " "), comments=True)
    except ValueError as error:
        raise FieldError("flags", f"expected names, each with its value: {error}") from None
    names, values = words[::2], words[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise FieldError("flags", f"expected names, each with its value, got {flags!r}")
    return dict(zip((name.removeprefix("--") for name in names), values, strict=True))


def _typed(name: str, value: Any) -> Any:
    kind = type(_DEFAULTS[name])
    if kind is bool:
        word = str(value).lower()
        if word not in ("yes", "true", "t", "y", "1", "no", "false", "f", "n", "0"):
            raise flag_error(name, f"expected True or False, got {value!r}")
        return word in ("yes", "true", "t", "y", "1")
    if kind is str and isinstance(value, list | tuple):
        return ",".join(map(str, value))
    try:
        typed = kind(value)
    except (TypeError, ValueError):
        typed = None
    if typed is None or (kind is int and typed != float(value)):
        raise flag_error(name, f"expected {_KINDS[kind]}, got {value!r}")
    return typed


def _check_value(name: str, value: Any) -> None:
    choices = {"noise_schedule": ("linear", "cosine"), "classifier_pool": _POOLS}.get(name)
    if choices and value not in choices:
        expected = ", ".join(map(repr, choices))
        raise flag_error(name, f"expected one of {expected}, got {value!r}")
    left_out = value == -1 and _DEFAULTS[name] == -1
    if type(value) is int and value < 1 and not left_out:
        raise flag_error(name, f"expected more than 0, got {value}")
    if name == "dropout" and not 0 <= value < 1:
        raise flag_error(name, f"expected 0 to 1, got {value}")


def is_default(name: str, value: Any) -> bool:
    """Whether this is what the flag is where it is not given."""
    return value == _DEFAULTS[name]


def flag_error(name: str, problem: str) -> FieldError:
    """What is wrong with one flag."""
    return FieldError("flags", f"{name}: {problem}")


def numbers(settings: Mapping[str, Any], name: str, kind: type) -> tuple[Any, ...]:
    """Those of a flag that has several. Raises `FieldError` unless all are above 0."""
    words = settings[name]
    try:
        found = tuple(map(kind, words.split(",")))
    except ValueError:
        found = ()
    if not found or min(found) <= 0:
        raise flag_error(name, f"expected numbers above 0 between commas, got {words!r}")
    return found
