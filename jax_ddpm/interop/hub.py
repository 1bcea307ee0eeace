"""Folders by their name on Hugging Face's hub, through huggingface_hub and its cache."""

import os
import re
from importlib import import_module
from pathlib import Path


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is "owner/name", and no local folder `owner` exists."""
    fits = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(name))
    return fits is not None and not Path(name).parent.exists()


def from_hub(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder in the cache, after what is missing there was downloaded: all configs, and of
    weights those of the U-Net that are read.

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
        stem = next(places, "") + "diffusion_pytorch_model"
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
