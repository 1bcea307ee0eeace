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

from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.interop.scheduler import complete_config, scheduler_config, scheduler_from_config
from jax_ddpm.interop.torch import read_state_dict, unet_from_torch, unet_to_torch
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.io.files import new_folder, read_json, write_json
from jax_ddpm.models import UNet

_STEM = "diffusion_pytorch_model"
_WEIGHTS = f"{_STEM}.safetensors"
_NULL_LABEL = "_null_label"  # in the U-Net's config, where diffusers passes over such names
_WRITTEN_FOR = "0.42.1"  # the diffusers that the tests open the folders with

# Fields of `UNet` that say how it computes, and are in no config.
_COMPUTING = ("dtype", "param_dtype", "precision", "remat", "parent", "name")
# Fields that `UNet2DModel` does not have: a run's config has them, a folder never.
_UNET_OURS: dict[str, Any] = {
    "num_attention_heads": None,
    "num_attention_heads_upsample": None,
    "time_proj_dim": None,
    "time_scale": 1,
}
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
_UNET_IGNORED = (
    "num_train_timesteps",  # says something only of learned time embeddings
    # How an `EMAModel` averaged the weights.
    *("decay", "inv_gamma", "min_decay", "optimization_step", "power"),
    *("update_after_step", "use_ema_warmup"),
)


def load_diffusers(
    folder: str | os.PathLike[str], *, revision: str | None = None, variant: str | None = None
) -> DiffusionModel:
    """Open a folder that `DDPMPipeline.save_pretrained` wrote, or one with the U-Net at its root.

    Weights keep their dtype, and are read-only views of the mapped file: leave it as it is while
    they are in use, or copy them, `jax.tree.map(np.array, variables)`. A U-Net without a scheduler
    is assumed to be one of Ho et al.'s (ε, T = 1,000, linear β), with a warning.

    Args:
      folder: a path, or a name on Hugging Face's hub ("google/ddpm-cat-256"), whose files come from
        huggingface_hub's cache or, if it can be reached, from the hub.
      revision: a branch, tag or commit on the hub.
      variant: the weights' variant ("fp16", "non_ema"), as in their file names.

    Raises:
      ValueError: a file is missing or damaged; a setting is not supported; a tensor is missing,
        unknown or misshapen; there is only a pickle (.bin), and torch is not installed to read it.
        The message names it.
      ImportError: `folder` is a name on the hub, and huggingface_hub is not installed.
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
        raise ValueError(
            f"{folder}: expected a folder of diffusers, got a run, which `runs.load_run` opens and "
            "`jax-ddpm convert` makes one of"
        )
    for part, kind in (read_json(index) if index.exists() else {}).items():
        known = part == "scheduler" or part.startswith(("_", "unet"))
        if not known and kind not in (None, [None, None]):
            raise ValueError(f"{index}: expected only a unet and a scheduler, got {part}: {kind}")
    unets = [path for path in (folder / "unet", folder / "unet_ema") if path.is_dir()]
    if len(unets) == 2:
        warnings.warn(f"{folder}: reading unet/; its average is in {unets[1]}", stacklevel=2)
    unet = (*unets, folder)[0]
    path = unet / "config.json"
    content = read_json(path)
    network = unet_from_config(content, path)
    try:
        check_words(network)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = _load_weights(unet, variant)
    try:
        variables = unet_from_torch(tensors, network, copy=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{unet}: {error}") from None
    said, labels = content.get(_NULL_LABEL), network.num_class_embeds
    last = None if labels is None else labels - 1
    if said not in (None, "none", last):
        expected = f"expected the last label, {last}, or 'none'"
        raise ValueError(f"{path}: {_NULL_LABEL}: {expected}, got {said!r}")
    size: Any = network.sample_size
    size = (size, size) if isinstance(size, int) else size
    return DiffusionModel(
        network,
        variables,
        image_shape=None if size is None else (*size, network.in_channels),
        # Of unknown meaning, the last label can be drawn, and guide.
        num_classes=labels if said in (None, "none") else last,
        null_label=None if said == "none" else last,
        **_load_scheduler(folder),
    )


def save_diffusers(folder: str | os.PathLike[str], model: DiffusionModel) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` opens, whole or not at all.

    β are written by name where they have one, else one by one; the null label stands beside
    diffusers' own settings. The scheduler is a `DDPMScheduler`, or a `DDIMScheduler` for a chain
    that ends in noise, whichever the model came with. Raises `ValueError` if the folder is not
    empty, if the variables are not the model's, or if diffusers has no word for a setting.
    """
    network = model.model
    if not isinstance(network, UNet):
        raise ValueError(f"model: expected a UNet, got {type(network).__name__}")
    check_words(network)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one that holds something")
    scheduler = {"_diffusers_version": _WRITTEN_FOR, **scheduler_config(model)}
    spacing, offset = model.timestep_spacing, model.steps_offset
    if model.variance_type != "fixed_small" and (spacing == "trailing" or offset):
        warnings.warn(
            f"variance_type: diffusers adds the noise of {model.variance_type!r} in the last "
            f"step of a shortened {spacing!r} chain too, and samples keep it; DDIMScheduler and "
            "timestep_spacing 'linspace' add none",
            stacklevel=2,
        )
    tensors = unet_to_torch(model.variables)
    unet_from_torch(tensors, network, copy=False)  # raises unless they are the model's
    unet = unet_config(network)
    if network.num_class_embeds is not None and model.null_label is None:
        unet[_NULL_LABEL] = "none"
    elif model.null_label is not None and model.null_label == model.num_classes:
        unet[_NULL_LABEL] = model.null_label
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": _WRITTEN_FOR,
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(folder) as new:
        (new / "unet").mkdir()
        (new / "scheduler").mkdir()
        save_tensors(new / "unet" / _WEIGHTS, tensors)
        write_json(new / "unet" / "config.json", unet)
        write_json(new / "scheduler" / "scheduler_config.json", scheduler)
        write_json(new / "model_index.json", index)


def unet_from_config(content: Mapping[str, Any], path: Path) -> UNet:
    """The network of a config `content`, read from `path`. Raises `ValueError` naming a setting."""
    if content.get("_class_name") == "UNetUnconditionalModel":  # its name until 2022
        content = {**content, "_class_name": "UNet2DModel"}
    defaults = {"UNet2DModel": _UNET_DEFAULTS | _UNET_FIXED}
    settings = complete_config(content, path, defaults, _UNET_IGNORED)
    for name, supported in _UNET_FIXED.items():
        value = settings.pop(name)
        if value != supported:
            raise ValueError(f"{path}: {name}: expected {supported!r}, got {value!r}")
    for name in ("down_block_types", "up_block_types"):  # with this prefix until 2022
        settings[name] = tuple(each.removeprefix("UNetRes") for each in settings[name])
    return UNet(**settings)


def unet_config(network: UNet) -> dict[str, Any]:
    """The config of `UNet2DModel` for `network`, with the fields that only `UNet` has, if set."""
    config = {"_class_name": "UNet2DModel", "_diffusers_version": _WRITTEN_FOR, **_UNET_FIXED}
    for name in _UNET_DEFAULTS:
        value = getattr(network, name)
        if name not in _UNET_OURS or value != _UNET_OURS[name]:
            config[name] = list(value) if isinstance(value, tuple) else value
    return config


def check_words(network: UNet) -> None:
    """Raises `ValueError` naming a setting that `UNet2DModel` does not have."""
    for name, default in _UNET_OURS.items():
        if (value := getattr(network, name)) != default:
            problem = f"expected {default} (`UNet2DModel` has no such setting), got {value}"
            raise ValueError(f"{name}: {problem}")


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is "owner/name", and no local folder `owner` exists."""
    fits = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(name))
    return fits is not None and not Path(name).parent.exists()


def from_hub(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder in huggingface_hub's cache, with all configs and the U-Net's weights downloaded.

    Raises `ValueError` if they are neither on the hub nor in the cache, and `ImportError`.
    """
    try:
        hub = import_module("huggingface_hub")
    except ImportError:
        raise ImportError(
            f"{name}: no such folder here; if it is a name on Hugging Face's hub: "
            'pip install "jax_ddpm[hub]"'
        ) from None

    def get(*patterns: str) -> Path:
        return Path(hub.snapshot_download(name, revision=revision, allow_patterns=list(patterns)))

    try:
        folder = get("*.json")
        places = (f"{each}/" for each in ("unet", "unet_ema") if (folder / each).is_dir())
        stem = next(places, "") + _STEM
        kind = "" if variant is None else f".{variant}"
        choices = [f"{kind}.safetensors", f"{kind}.bin"]
        if variant is None:
            choices.append(".*.safetensors")  # whichever variant there is
        for choice in choices:
            beside = choice.replace(f"{kind}.", f"{kind}-*.", 1)  # in shards
            get(f"{stem}{choice}", f"{stem}{beside}")
            if any(folder.glob(f"{stem}{choice}")) or any(folder.glob(f"{stem}{beside}")):
                break
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: expected a folder of diffusers, got none here, and on the hub: {reason}"
        ) from None
    return folder


def _load_scheduler(folder: Path) -> dict[str, Any]:
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.exists():
            return scheduler_from_config(read_json(path), path)
    if (folder / "model_index.json").exists():
        raise ValueError(f"{folder}: expected scheduler/scheduler_config.json, got none")
    warnings.warn(
        f"{folder}: no scheduler_config.json: assuming ε, linear β and T = 1,000", stacklevel=3
    )
    return scheduler_from_config({}, folder)


def _load_weights(folder: Path, variant: str | None) -> dict[str, np.ndarray]:
    def called(name: str) -> str:
        """diffusers' name of a variant: `diffusion_pytorch_model.fp16.safetensors`."""
        stem, _, suffix = name.rpartition(".")
        return name if variant is None else f"{stem}.{variant}.{suffix}"

    for name in (_WEIGHTS, f"{_STEM}.bin"):
        index = folder / called(f"{name}.index.json")
        if (folder / called(name)).exists():
            return _load(folder / called(name))
        if index.exists():
            return _load_shards(index)
    others = sorted(folder.glob(f"{_STEM}.*.safetensors"))  # fp16, non_ema, …
    if variant is None and len(others) == 1:
        return _load(others[0])
    names = ", ".join(sorted(path.name for path in folder.iterdir() if path.suffix != ".json"))
    several = "several others: " if variant is None and others else ""
    raise ValueError(f"{folder}: expected {called(_WEIGHTS)}, got {several}{names or 'none'}")


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_state_dict(path)
    except (ImportError, ValueError) as error:
        if path.suffix == ".safetensors":
            raise
        folder = path.parent
        raise ValueError(
            f"{error}. It is a pickle, which can run code; convert it where you trust it: "
            f'python -c "from diffusers import UNet2DModel as M; '
            f"M.from_pretrained('{folder}').save_pretrained('{folder}')\""
        ) from None


def _load_shards(index: Path) -> dict[str, np.ndarray]:
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(
        isinstance(file, str) and Path(file).name == file for file in places.values()
    ):
        raise ValueError(f"{index}: expected a weight_map of tensors to files beside it")
    tensors: dict[str, np.ndarray] = {}
    for file in sorted(set(places.values())):
        tensors |= _load(index.with_name(file))
    for name, file in places.items():
        if name not in tensors:
            raise ValueError(f"{index.with_name(file)}: expected a tensor {name}, got none")
    return tensors
