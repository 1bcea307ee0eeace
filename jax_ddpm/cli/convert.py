"""`jax-ddpm convert`: between a run, a folder of diffusers and a PyTorch state dict."""

from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm.cli.config import ConvertConfig, UsageError, naming, writing
from jax_ddpm.cli.runs import Run, load_model, save_run
from jax_ddpm.interop import (
    Pretrained,
    save_diffusers,
    simple_unet_from_torch,
    simple_unet_to_torch,
    unet_to_torch,
)
from jax_ddpm.io.arrays import load_tensors, save_tensors
from jax_ddpm.models import SimpleUNet
from jax_ddpm.schedule import linear_beta_schedule, make_schedule

__all__ = ["convert"]

_TUTORIAL_TIMESTEPS = 200


def convert(config: ConvertConfig) -> None:
    """Read `config.source`, whatever it is, and write it as `config.to` says."""
    run = _load(config)
    if config.out.exists():
        raise UsageError(f"OUT: {config.out} exists already")
    if not config.out.parent.is_dir():
        raise UsageError(f"OUT: no such folder: {config.out.parent}")
    with writing("OUT", config.out):
        hint = _write(config, run)
    print(f"wrote {config.out}\n\nnext: {hint}")


def _write(config: ConvertConfig, run: Run) -> str:
    """What to do with it next."""
    if config.to == "run":
        save_run(config.out, run)
        return f"jax-ddpm sample --run {config.out}"
    pretrained = run.pretrained
    if config.to == "diffusers":
        try:
            save_diffusers(config.out, pretrained)
        except ValueError as error:
            raise UsageError(f"--to diffusers: {error}") from None
        return f"DDPMPipeline.from_pretrained({str(config.out)!r})"
    if config.out.suffix != ".safetensors":
        raise UsageError(f"OUT: expected a .safetensors file, got {config.out}")
    simple = isinstance(pretrained.model, SimpleUNet)
    to_torch = simple_unet_to_torch if simple else unet_to_torch
    save_tensors(config.out, to_torch(pretrained.variables))
    return f"model.load_state_dict(safetensors.torch.load_file({str(config.out)!r}))"


def _load(config: ConvertConfig) -> Run:
    source = config.source
    if not source.exists():
        raise UsageError(f"SOURCE: no such file or folder: {source}")
    if source.is_file():
        return _load_state_dict(source, config.image_size)
    with naming("SOURCE"):
        return load_model(source, config.weights)


def _load_state_dict(path: Path, image_size: int) -> Run:
    """The tutorial's network, with the tutorial's schedule."""
    if path.suffix in (".pt", ".pth", ".bin", ".pkl"):
        raise UsageError(
            f"SOURCE: {path} is a pickle, which can run code; convert it where you trust it: "
            f'python -c "import torch, safetensors.torch as s; '
            f"s.save_file(torch.load('{path}', weights_only=True), 'weights.safetensors')\""
        )
    try:
        variables: dict[str, Any] = simple_unet_from_torch(load_tensors(path))
    except ValueError as error:
        raise UsageError(f"SOURCE: {error}") from None
    channels = int(np.shape(variables["params"]["down1"]["kernel"])[2])
    schedule = make_schedule(linear_beta_schedule(_TUTORIAL_TIMESTEPS))
    pretrained = Pretrained(
        SimpleUNet(channels=channels), variables, schedule, timestep_spacing="trailing"
    )
    shape = (image_size, image_size, channels)
    return Run(pretrained, shape, num_classes=None, null_label=None, guidance=1.0)
