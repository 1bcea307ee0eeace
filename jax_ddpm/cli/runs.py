"""A run on the disk: what was asked for, the measurements, the weights.

Network and schedule are written in the words of diffusers' configs, as `interop` reads them.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm import __version__
from jax_ddpm.cli.config import ScheduleName, TrainConfig, UsageError
from jax_ddpm.interop.arrays import load_arrays, save_arrays
from jax_ddpm.interop.configs import read_json
from jax_ddpm.interop.diffusers import Pretrained, load_diffusers, unet_config, unet_from_config
from jax_ddpm.interop.scheduler import Scheduler, scheduler_config, scheduler_from_config
from jax_ddpm.models import SimpleUNet, UNet
from jax_ddpm.schedule import (
    NoiseSchedule,
    cosine_beta_schedule,
    linear_beta_schedule,
    make_schedule,
    scaled_linear_beta_schedule,
    sigmoid_beta_schedule,
)

__all__ = [
    "Run",
    "create_run",
    "init_variables",
    "load_model",
    "load_pretrained",
    "load_run",
    "named_schedule",
    "save_weights",
    "write_bytes",
    "write_text",
]

_BETAS = {
    "linear": linear_beta_schedule,
    "scaled_linear": scaled_linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
}


class Run(NamedTuple):
    """A trained model and what is needed to draw from it."""

    pretrained: Pretrained
    """Its weights are the average (EMA)."""
    image_shape: tuple[int, int, int]
    num_classes: int | None
    """Labels 0 … num_classes - 1 stand for something; None without classes."""
    null_label: int | None
    guidance: float


def named_schedule(name: ScheduleName, timesteps: int) -> NoiseSchedule:
    """The schedule that `--schedule` names."""
    return make_schedule(_BETAS[name](timesteps))


def init_variables(model: UNet | SimpleUNet, key: Any, image_shape: tuple[int, ...]) -> Any:
    """Initial variables. Raises `UsageError` if images of this shape do not suit the network."""
    arguments = [jnp.zeros((1, *image_shape), jnp.float32), jnp.zeros((1,), jnp.int32)]
    if isinstance(model, UNet) and model.num_class_embeds is not None:
        arguments.append(jnp.zeros((1,), jnp.int32))
    try:
        return jax.jit(model.init)(key, *arguments)
    except ValueError as error:
        raise UsageError(f"the network refuses images of {image_shape}: {error}") from None


def create_run(folder: Path, run: Run, settings: TrainConfig | None = None) -> None:
    """Make the run's folder and its config.json. Refuses a folder that holds anything."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--name: {folder} exists already: choose another name, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write {folder}: {error.strerror}") from None
    model, scheduler = run.pretrained.model, Scheduler(*run.pretrained[2:])
    if isinstance(model, UNet):
        network = unet_config(model)
    else:
        network = {"_class_name": "SimpleUNet", "channels": model.channels}
    description = {
        "model": network,
        "scheduler": scheduler_config(scheduler),
        "image_shape": list(run.image_shape),
        "num_classes": run.num_classes,
        "null_label": run.null_label,
        "guidance": run.guidance,
        "train": settings and json.loads(json.dumps(asdict(settings), default=str)),
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")


def save_weights(folder: Path, params: Mapping[str, Any], ema_params: Mapping[str, Any]) -> None:
    """Write the run's weights, and their average, which is what samples are drawn from."""
    save_arrays(folder / "params.safetensors", params)
    save_arrays(folder / "ema.safetensors", ema_params)


def load_run(folder: Path, weights: str = "ema") -> Run:
    """Read a run. Raises `UsageError` naming what is missing or does not fit."""
    path = folder / "config.json"
    if not path.is_file():
        is_diffusers = (folder / "model_index.json").exists()
        hint = ": a folder of diffusers, for --pretrained" if is_diffusers else ""
        raise UsageError(f"expected a run's folder, got {folder} (no config.json in it){hint}")
    try:
        description = read_json(path)
        height, width, channels = description["image_shape"]
        model = _model(description["model"], path)
        scheduler = scheduler_from_config(description["scheduler"], path)
        labelling = [description[name] for name in ("num_classes", "null_label", "guidance")]
        image_shape = (height, width, channels)
        expected = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise UsageError(f"{path} is not a run's config: {_line(error)}") from None
    try:
        variables = load_arrays(folder / f"{weights}.safetensors")
        _check_tree(folder / f"{weights}.safetensors", variables, expected)
    except ValueError as error:
        raise UsageError(str(error)) from None
    return Run(Pretrained(model, variables, *scheduler), image_shape, *labelling)


def load_pretrained(folder: Path) -> Run:
    """Read a folder of diffusers. Raises `UsageError` naming what is missing or does not fit."""
    if (folder / "ema.safetensors").exists():
        raise UsageError(f"{folder} is a run, for --run, and no folder of diffusers")
    try:
        pretrained = load_diffusers(folder)
    except ValueError as error:
        raise UsageError(str(error)) from None
    model: Any = pretrained.model
    size = model.sample_size
    if size is None:
        raise UsageError(f"{folder}: expected sample_size in the U-Net's config, got null")
    height, width = (size, size) if isinstance(size, int) else size
    image_shape = (height, width, model.in_channels)
    channels = model.in_channels * (2 if pretrained.variance_type.startswith("learned") else 1)
    if model.out_channels != channels:
        raise UsageError(
            f"{folder}: expected {channels} output channels for variance_type "
            f"{pretrained.variance_type!r}, got {model.out_channels}"
        )
    if pretrained.prediction_type == "epsilon" and pretrained.schedule.alphas_cumprod[-1] == 0:
        raise UsageError(f"{folder}: zero terminal SNR says nothing to a network that predicts ε")
    try:
        jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except UsageError as error:
        raise UsageError(f"{folder}: sample_size: {error}") from None
    classes = model.num_class_embeds
    null_label = None if classes is None else classes - 1
    return Run(pretrained, image_shape, classes, null_label, guidance=1.0)


def load_model(folder: Path) -> Run:
    """A run or a folder of diffusers, whichever `folder` is."""
    return load_run(folder) if (folder / "ema.safetensors").exists() else load_pretrained(folder)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes | bytearray) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _model(content: Mapping[str, Any], path: Path) -> UNet | SimpleUNet:
    if content.get("_class_name") == "SimpleUNet":
        return SimpleUNet(channels=content["channels"])
    return unet_from_config(content, path)


def _check_tree(path: Path, variables: Any, expected: Any) -> None:
    got = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in _leaves(variables)}
    want = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in _leaves(expected)}
    for name in sorted(got.keys() | want.keys()):
        if name not in got:
            raise ValueError(f"{path}: expected an array {name}, got none")
        if name not in want:
            raise ValueError(f"{path}: expected only the model's arrays, got {name}")
        if got[name].shape != want[name].shape:
            raise ValueError(
                f"{path}: expected {name} of shape {want[name].shape}, got {got[name].shape}"
            )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)


def _line(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
