"""Folders by their name on Hugging Face's hub, through huggingface_hub and its cache."""

import os
import re
from functools import partial
from importlib import import_module
from pathlib import Path

from jax_ddpm._extras import install_command

__all__ = ["from_hub", "is_hub_name"]


def is_hub_name(name: str | os.PathLike[str]) -> bool:
    """Whether `name` is "owner/name", and no path here: a folder `owner` would make it one."""
    fits = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", os.fspath(name))
    return fits is not None and not Path(name).parent.exists()


def from_hub(name: str, revision: str | None, variant: str | None) -> Path:
    """The folder in the cache, after whatever is missing there was downloaded.

    Of weights only those that are read: safetensors of the `variant`, or where there are none, a
    pickle. Raises `ValueError` if they are neither on the hub nor in the cache, and `ImportError`.
    """
    try:
        hub = import_module("huggingface_hub")
    except ImportError:
        raise ImportError(f"{name} is on the hub, which needs {install_command('hub')}") from None
    get = partial(hub.snapshot_download, name, revision=revision)
    stem = "*diffusion_pytorch_model" + ("" if variant is None else f".{variant}")
    try:
        folder = Path(
            get(allow_patterns=["*.json", f"{stem}.safetensors", f"{stem}-*.safetensors"])
        )
        if not any(folder.rglob("*.safetensors")):
            get(allow_patterns=[f"{stem}.bin"])
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{name}: expected a folder of diffusers, got none here, and on the hub: {reason}"
        ) from None
    return folder
