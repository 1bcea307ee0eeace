"""Folders of diffusers' `DDPMPipeline`, in and out.

model_index.json
unet/config.json                                   (or the U-Net's two files at the root)
unet/diffusion_pytorch_model.safetensors           (or shards, with an index)
scheduler/scheduler_config.json                    (or at the root)
"""

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm.interop.configs import complete_config
from jax_ddpm.interop.hub import from_hub, is_hub_name
from jax_ddpm.interop.model import DiffusionModel
from jax_ddpm.interop.scheduler import (
    default_scheduler,
    scheduler_config,
    scheduler_from_config,
)
from jax_ddpm.interop.tensors import read_state_dict
from jax_ddpm.interop.unet import unet_from_torch, unet_to_torch, unet_variables
from jax_ddpm.io.arrays import save_tensors
from jax_ddpm.io.files import new_folder
from jax_ddpm.io.json import read_json, write_json
from jax_ddpm.models import UNet

_WEIGHTS = "diffusion_pytorch_model.safetensors"
_NULL_LABEL = "_null_label"  # in the U-Net's config, where diffusers passes over such names
_PICKLE = "diffusion_pytorch_model.bin"
_WRITTEN_FOR = "0.42.1"  # the diffusers that the tests open the folders with

# What `UNet2DModel` takes for a setting that its config leaves out.
_UNET_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "center_input_sample": False,
    "time_embedding_dim": None,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "downsample_padding": 1,
    "downsample_type": "conv",
    "upsample_type": "conv",
    "dropout": 0.0,
    "act_fn": "silu",
    "attention_head_dim": 8,
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "norm_eps": 1e-5,
    "resnet_time_scale_shift": "default",
    "add_attention": True,
    "num_class_embeds": None,
}
# Settings with one supported value.
_UNET_FIXED: dict[str, Any] = {
    "time_embedding_type": "positional",
    "class_embed_type": None,
}
# What `UNet` has and `UNet2DModel` has no word for: a run's config has them, a folder never.
_UNET_OURS: dict[str, Any] = {
    "num_attention_heads": None,
    "num_attention_heads_upsample": None,
    "time_proj_dim": None,
    "time_scale": 1,
}
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
    they are in use, or copy them, `jax.tree.map(np.array, variables)`. A U-Net that comes without a
    scheduler is taken for one of Ho et al.'s (ε, T = 1,000, linear β), with a warning.

    Args:
      folder: a path, or a name on Hugging Face's hub ("google/ddpm-cat-256"). The files of a name
        come through huggingface_hub's cache, and from the hub if that can be reached.
      revision: a branch, a tag or a commit on the hub.
      variant: which weights ("fp16", "non_ema"), as they are called in the names of files.

    Raises:
      ValueError: a file is missing or damaged; a config says what is not supported; a tensor is
        missing, unknown or misshapen; there is a pickle alone (.bin), and torch is not installed
        to read it. The message names it.
      ImportError: `folder` is a name on the hub, and huggingface_hub is not installed.
    """
    name, folder = folder, Path(folder)
    if is_hub_name(name):
        folder = from_hub(str(name), revision, variant)
    elif revision is not None:
        raise ValueError(f"revision: expected None for a folder, got {revision!r}")
    if not folder.is_dir():
        raise ValueError(
            f"{folder}: expected a folder of diffusers, got none; nothing is downloaded"
        )
    if (folder / "checkpoints").is_dir() and not (folder / "model_index.json").exists():
        raise ValueError(
            f"{folder}: expected a folder of diffusers, got a run, which `runs.load_run` opens and "
            "`jax-ddpm convert` makes one of"
        )
    unet = _unet_folder(folder)
    path = unet / "config.json"
    content = read_json(path)
    _check_index(folder / "model_index.json")
    model = unet_from_config(content, path)
    try:
        check_words(model)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    tensors = _load_weights(unet, variant)
    try:
        variables = unet_variables(tensors, model)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{unet}: {error}") from None
    said, labels = content.get(_NULL_LABEL), model.num_class_embeds
    last = None if labels is None else labels - 1
    if said not in (None, "none", last):
        expected = f"expected the last label, {last}, or 'none'"
        raise ValueError(f"{path}: {_NULL_LABEL}: {expected}, got {said!r}")
    size: Any = model.sample_size
    size = (size, size) if isinstance(size, int) else size
    return DiffusionModel(
        model,
        variables,
        image_shape=None if size is None else (*size, model.in_channels),
        # If it is not said whether the last label is the null label, it can be drawn and guide.
        num_classes=labels if said in (None, "none") else last,
        null_label=None if said == "none" else last,
        **_load_scheduler(folder),
    )


def save_diffusers(folder: str | os.PathLike[str], model: DiffusionModel) -> None:
    """Write a folder that `DDPMPipeline.from_pretrained` opens, whole or not at all.

    β go by name where they have one, otherwise one by one; the null label goes beside diffusers'
    own settings. The scheduler is a `DDPMScheduler`, or a `DDIMScheduler` for a chain that ends in
    noise, whichever the model came with. Raises `ValueError` if the folder holds anything, if the
    variables are not the model's, or if diffusers has no word for a setting.
    """
    network = model.model
    if not isinstance(network, UNet):
        raise ValueError(f"model: expected a UNet, got {type(network).__name__}")
    check_words(network)
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: expected a new or empty folder, got one that holds something")
    config = {"_diffusers_version": _WRITTEN_FOR, **scheduler_config(model)}
    spacing, offset = model.timestep_spacing, model.steps_offset
    if model.variance_type != "fixed_small" and (spacing == "trailing" or offset):
        warnings.warn(
            f"variance_type: diffusers adds the noise of {model.variance_type!r} in the last "
            f"step of a shortened {spacing!r} chain too, and samples keep it; DDIMScheduler and "
            "timestep_spacing 'linspace' add none",
            stacklevel=4,
        )
    tensors = unet_to_torch(model.variables)
    unet_from_torch(tensors, network)  # raises unless they are the model's
    unet = unet_config(network)
    if network.num_class_embeds is not None and model.null_label is None:
        unet[_NULL_LABEL] = "none"
    elif model.null_label is not None and model.null_label == model.num_classes:
        unet[_NULL_LABEL] = model.null_label
    index = {
        "_class_name": "DDPMPipeline",
        "_diffusers_version": _WRITTEN_FOR,
        "scheduler": ["diffusers", config["_class_name"]],
        "unet": ["diffusers", "UNet2DModel"],
    }
    with new_folder(folder) as new:
        (new / "unet").mkdir()
        (new / "scheduler").mkdir()
        save_tensors(new / "unet" / _WEIGHTS, tensors)
        write_json(new / "unet" / "config.json", unet)
        write_json(new / "scheduler" / "scheduler_config.json", config)
        write_json(new / "model_index.json", index)


def unet_from_config(content: Mapping[str, Any], path: Path) -> UNet:
    """The network that `content`, read from `path`, says. `ValueError` for what it cannot be."""
    if content.get("_class_name") == "UNetUnconditionalModel":  # its name until 2022
        content = {**content, "_class_name": "UNet2DModel"}
    defaults = {"UNet2DModel": _UNET_DEFAULTS | _UNET_FIXED | _UNET_OURS}
    settings = complete_config(content, path, defaults, _UNET_IGNORED)
    for name, supported in _UNET_FIXED.items():
        value = settings.pop(name)
        if value != supported:
            raise ValueError(f"{path}: {name}: expected {supported!r}, got {value!r}")
    for name in ("down_block_types", "up_block_types"):  # with this prefix until 2022
        settings[name] = tuple(each.removeprefix("UNetRes") for each in settings[name])
    return UNet(**settings)


def unet_config(model: UNet) -> dict[str, Any]:
    """The config of `UNet2DModel` that says `model`, and what only `UNet` has, where it is set."""
    settings = {name: getattr(model, name) for name in _UNET_DEFAULTS} | _ours(model)
    listed = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    names = {"_class_name": "UNet2DModel", "_diffusers_version": _WRITTEN_FOR}
    return {**names, **listed, **_UNET_FIXED}


def _ours(model: UNet) -> dict[str, Any]:
    settings = {name: getattr(model, name) for name in _UNET_OURS}
    return {name: value for name, value in settings.items() if value != _UNET_OURS[name]}


def check_words(model: UNet) -> None:
    """Raises `ValueError` naming a setting of the network that `UNet2DModel` does not have."""
    for name, value in _ours(model).items():
        raise ValueError(
            f"{name}: expected {_UNET_OURS[name]} (`UNet2DModel` has no such setting), got {value}"
        )


def _check_index(path: Path) -> None:
    """Raises `ValueError` for a pipeline that does not draw images with a U-Net alone."""
    if not path.exists():
        return
    for name, kind in read_json(path).items():
        known = name == "scheduler" or name.startswith(("_", "unet"))
        if not known and kind not in (None, [None, None]):
            raise ValueError(f"{path}: expected only a unet and a scheduler, got {name}: {kind}")


def _unet_folder(folder: Path) -> Path:
    unet, average = folder / "unet", folder / "unet_ema"
    if unet.is_dir() and average.is_dir():
        warnings.warn(f"{folder}: reading unet/; its average is in {average}", stacklevel=4)
    return next((each for each in (unet, average) if each.is_dir()), folder)


def _load_scheduler(folder: Path) -> dict[str, Any]:
    for path in (folder / "scheduler" / "scheduler_config.json", folder / "scheduler_config.json"):
        if path.exists():
            return scheduler_from_config(read_json(path), path)
    if (folder / "model_index.json").exists():
        raise ValueError(f"{folder}: expected scheduler/scheduler_config.json, got none")
    warnings.warn(
        f"{folder}: no scheduler_config.json: assuming ε, linear β and T = 1,000", stacklevel=4
    )
    return default_scheduler()


def _load_weights(folder: Path, variant: str | None) -> dict[str, np.ndarray]:
    weights, pickle = (_variant(name, variant) for name in (_WEIGHTS, _PICKLE))
    for name in (weights, pickle):
        stem = _PICKLE if name == pickle else _WEIGHTS
        index = folder / _variant(f"{stem}.index.json", variant)
        if (folder / name).exists():
            return _load(folder / name)
        if index.exists():
            return _load_shards(index)
    if variant is not None:
        raise ValueError(f"{folder}: expected {weights}, got {_others(folder)}")
    variants = sorted(folder.glob("diffusion_pytorch_model.*.safetensors"))  # fp16, non_ema, …
    if len(variants) == 1:
        return _load(variants[0])
    if variants:
        names = ", ".join(each.name for each in variants)
        raise ValueError(f"{folder}: expected {_WEIGHTS}, got several others: {names}")
    raise ValueError(f"{folder}: expected {_WEIGHTS}, got {_others(folder)}")


def _variant(name: str, variant: str | None) -> str:
    """diffusers' name of the file: `diffusion_pytorch_model.fp16.safetensors`."""
    stem, _, suffix = name.rpartition(".")
    return name if variant is None else f"{stem}.{variant}.{suffix}"


def _others(folder: Path) -> str:
    names = sorted(each.name for each in folder.iterdir() if each.suffix != ".json")
    return ", ".join(names) or "none"


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
