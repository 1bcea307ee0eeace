"""Folders of diffusers' `DDPMPipeline`, in and out.

model_index.json
unet/config.json                                   (or the U-Net's two files at the root)
unet/diffusion_pytorch_model.safetensors           (or shards, with an index)
scheduler/scheduler_config.json                    (or at the root)
"""

import os
import re
import warnings
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import FieldError, check_choice, check_kind
from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.interop.scheduler import completed, naming, scheduler_config, scheduler_from_config
from jax_ddpm.interop.torch import read_state_dict, unet_from_torch, unet_to_torch
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.io.files import new_folder, read_json, write_json
from jax_ddpm.models import UNet

_STEM = "diffusion_pytorch_model"
_NULL_LABEL = "_null_label"  # in the U-Net's config, where diffusers passes over such names
_WRITTEN_FOR = "0.42.1"  # the diffusers that the tests open the folders with

# Fields of `UNet` that say how it computes, and are in no config.
_COMPUTING = ("dtype", "param_dtype", "precision", "remat", "parent", "name")
# Fields that `UNet2DModel` does not have: a run's config has them, a folder never.
_UNET_OURS = ("num_attention_heads", "num_attention_heads_upsample", "time_proj_dim", "time_scale")
# The defaults of `UNet2DModel`: those of `UNet`, except for some.
_UNET_DEFAULTS: dict[str, Any] = {
    **{each.name: each.default for each in fields(UNet) if each.name not in _COMPUTING},
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "downsample_padding": 1,
    "attention_head_dim": 8,
    "norm_eps": 1e-5,
}
# Settings with one supported value.
_UNET_FIXED: dict[str, Any] = {"time_embedding_type": "positional", "class_embed_type": None}
# Of learned time embeddings, and of how an `EMAModel` averaged the weights.
_UNET_IGNORED = ("num_train_timesteps", "decay", "inv_gamma", "min_decay", "optimization_step")
_UNET_IGNORED += ("power", "update_after_step", "use_ema_warmup")


def load_diffusers(
    folder: str | os.PathLike[str], *, revision: str | None = None, variant: str | None = None
) -> DiffusionModel:
    """Read a folder that `DDPMPipeline.save_pretrained` wrote, or one with the U-Net at its root.

    Weights keep their dtype, and are read-only views of the mapped file: leave it unchanged while
    they are in use, or copy them, `jax.tree.map(np.array, model.variables)`. Without a scheduler,
    Ho et al.'s settings (ε, T = 1,000, linear β) are assumed, with a warning.

    Args:
      folder: a path, or a name on Hugging Face's hub ("google/ddpm-cat-256"), whose files come from
        huggingface_hub's cache or, if it can be reached, from the hub.
      revision: a branch, tag or commit on the hub.
      variant: of the weights, as in their file names ("fp16", "non_ema").

    Raises:
      ValueError: a file, setting or tensor is missing, unknown or damaged; the message names it.
      ImportError: a pickle (.bin) without torch, or a name on the hub without huggingface_hub.

    Examples:
      >>> interop.save_diffusers("pipeline", runs.load_run("runs/digits"))
      >>> interop.load_diffusers("pipeline").image_shape
      (8, 8, 1)
    """
    name, folder = folder, Path(folder)
    if is_hub_name(name):
        folder = from_hub(str(name), revision, variant)
    elif revision is not None:
        raise ValueError(f"revision: expected None for a folder, got {revision!r}")
    if not folder.is_dir():
        raise ValueError(f"{folder}: expected a folder of diffusers, got none")
    index = folder / "model_index.json"
    if (folder / "checkpoints").is_dir() and not index.exists():
        raise ValueError(f"{folder}: expected a folder of diffusers, got a run (`runs.load_run`)")
    for part, kind in (read_json(index) if index.exists() else {}).items():
        if not part.startswith(("_", "unet", "scheduler")) and kind not in (None, [None, None]):
            raise ValueError(f"{index}: expected only a unet and a scheduler, got {part}: {kind}")
    unets = [path for path in (folder / "unet", folder / "unet_ema") if path.is_dir()]
    if len(unets) == 2:
        warnings.warn(f"{folder}: reading unet/; its average is in {unets[1]}", stacklevel=2)
    unet = (*unets, folder)[0]
    path = unet / "config.json"
    content = read_json(path)
    network = unet_from_config(content, path)
    labels, null_label = network.num_class_embeds, content.get(_NULL_LABEL)
    last = None if labels is None else labels - 1
    with naming(path):
        network.check_fields()
        check_words(network)
        check_choice(_NULL_LABEL, null_label, (None, "none", last))
    tensors = _load_weights(unet, variant)
    with naming(unet):
        variables = unet_from_torch(tensors, network, copy=False)
    paths = [folder / each / "scheduler_config.json" for each in ("scheduler", "")]
    path = next(filter(Path.exists, paths), paths[0])
    is_assumed = not path.exists() and not index.exists()
    if is_assumed:
        warnings.warn(f"{folder}: no scheduler_config.json: assuming Ho et al.'s", stacklevel=2)
    size, channels = network.sample_size, network.in_channels
    return DiffusionModel(
        network,
        variables,
        image_shape=None if size is None else (*np.broadcast_to(size, 2).tolist(), channels),
        # Of unknown meaning, the last label can be drawn, and guide.
        num_classes=labels if null_label in (None, "none") else last,
        null_label=None if null_label == "none" else last,
        guidance=content.get("_guidance", 1.0),
        **scheduler_from_config({} if is_assumed else read_json(path), path),
    )


def save_diffusers(folder: str | os.PathLike[str], model: DiffusionModel) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` opens, whole or not at all.

    The scheduler is a `DDPMScheduler`, or a `DDIMScheduler` if `set_alpha_to_one` is False. The
    folder lacks `class_names`, `learned` and `preparation`, which `runs.save_run` keeps.

    Args:
      folder: a new or empty folder.
      model: a `DiffusionModel` of a `UNet`, whose schedule is not respaced.

    Raises:
      ValueError: `folder` is not empty, the variables do not fit, or diffusers lacks a setting.

    Examples:
      >>> model = runs.load_run("runs/digits")
      >>> interop.save_diffusers("exported", model)
      >>> again = interop.load_diffusers("exported")
      >>> jax.tree.all(jax.tree.map(np.array_equal, model.variables, again.variables))
      True
    """
    check_kind("model", model, DiffusionModel, "load_run(folder)")
    network: Any = model.model
    check_kind("model", network, UNet, "ddpm_digits()")
    check_words(network)
    check_choice("null_label", model.null_label, (None, (network.num_class_embeds or 0) - 1))
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one that holds something")
    scheduler = {"_diffusers_version": _WRITTEN_FOR, **scheduler_config(model)}
    spacing, offset = model.timestep_spacing, model.steps_offset
    if model.variance_type != "fixed_small" and (spacing == "trailing" or offset):
        warnings.warn(
            f"variance_type: diffusers adds the noise of {model.variance_type!r} in the last step "
            f"of a shortened {spacing!r} chain too; DDIMScheduler and 'linspace' add none",
            stacklevel=2,
        )
    tensors = unet_to_torch(model.variables)
    unet_from_torch(tensors, network, copy=False)  # raises unless they are the model's
    unet = unet_config(network) | {"_guidance": model.guidance}
    if network.sample_size is None and model.image_shape is not None:
        unet["sample_size"] = model.image_shape[:2]
    if network.num_class_embeds is not None and model.null_label in (None, model.num_classes):
        unet[_NULL_LABEL] = "none" if model.null_label is None else model.null_label
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": _WRITTEN_FOR,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", unet["_class_name"]],
    }
    with new_folder(folder) as new:
        (new / "scheduler").mkdir()
        (new / "unet").mkdir()
        write_json(new / "scheduler/scheduler_config.json", scheduler)
        write_json(new / "unet/config.json", unet)
        save_tensors(new / f"unet/{_STEM}.safetensors", tensors)
        write_json(new / "model_index.json", index)


def unet_from_config(content: Mapping[str, Any], path: Path) -> UNet:
    """The network of a config `content`, read from `path`. Raises `ValueError` naming a setting."""
    kinds = ("UNet2DModel", "UNetUnconditionalModel")  # the latter until 2022
    with naming(path):
        defaults: dict[str, Any] = dict.fromkeys(kinds, _UNET_DEFAULTS | _UNET_FIXED)
        settings = completed(content, defaults, _UNET_IGNORED)
        for name, supported in _UNET_FIXED.items():
            check_choice(name, settings.pop(name), (supported,))
        for name in ("down_block_types", "up_block_types"):  # with this prefix until 2022
            settings[name] = tuple(each.removeprefix("UNetRes") for each in settings[name])
        return UNet(**settings)


def unet_config(network: UNet) -> dict[str, Any]:
    """The config of `UNet2DModel` for `network`, with the fields that only `UNet` has, if set."""
    config = {"_class_name": "UNet2DModel", "_diffusers_version": _WRITTEN_FOR, **_UNET_FIXED}
    for name, default in _UNET_DEFAULTS.items():
        value = getattr(network, name)
        if name not in _UNET_OURS or value != default:
            config[name] = value
    return config


def check_words(network: UNet) -> None:
    """Raises `ValueError` naming a setting that `UNet2DModel` does not have."""
    for name in _UNET_OURS:
        if (value := getattr(network, name)) != _UNET_DEFAULTS[name]:
            expected = f"expected {_UNET_DEFAULTS[name]} (`UNet2DModel` has no such setting)"
            raise FieldError(name, f"{expected}, got {value}")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is "owner/name", and no local folder `owner` exists."""
    fits = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(name))
    return fits is not None and not Path(name).parent.exists()


def from_hub(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder in huggingface_hub's cache, with all configs and the U-Net's weights."""
    try:
        download = import_module("huggingface_hub").snapshot_download
    except ImportError:
        hint = 'if it is a name on Hugging Face\'s hub: pip install "jax_ddpm[hub]"'
        raise ImportError(f"{name}: no such folder here; {hint}") from None
    try:
        folder = Path(download(name, revision=revision, allow_patterns=["*.json"]))
        places = (f"{each}/" for each in ("unet", "unet_ema") if (folder / each).is_dir())
        stem = next(places, "") + (_STEM if variant is None else f"{_STEM}.{variant}")
        for suffix in ("safetensors", "bin", "*.safetensors"):  # at last, whichever variant
            patterns = [f"{stem}.{suffix}", f"{stem}-*.{suffix}"]  # whole, or in shards
            download(name, revision=revision, allow_patterns=patterns)
            if any(file for pattern in patterns for file in folder.glob(pattern)):
                break
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        at = "" if revision is None else f" at revision {revision!r}"
        expected = f"expected a folder of diffusers, got none here, and on the hub{at}"
        raise ValueError(f"{name}: {expected}: {reason}") from None
    return folder


def _load_weights(folder: Path, variant: str | None) -> dict[str, np.ndarray]:
    """The tensors of a whole file, of shards with an index, or of the only variant."""
    part = "" if variant is None else f".{variant}"
    for suffix in ("safetensors", "bin"):
        whole = folder / f"{_STEM}{part}.{suffix}"
        index = folder / f"{_STEM}.{suffix}.index{part}.json"
        if whole.exists():
            return read_state_dict(whole)
        if index.exists():
            tensors = {}
            for file in sorted(set(read_json(index).get("weight_map", {}).values())):
                tensors |= read_state_dict(folder / Path(file).name)
            return tensors
    others = sorted(folder.glob(f"{_STEM}.*.safetensors"))  # fp16, non_ema, …
    if variant is None and len(others) == 1:
        return read_state_dict(others[0])
    names = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix != ".json"))
    raise ValueError(f"{folder}: expected {_STEM}{part}.safetensors, got {names or 'none'}")
