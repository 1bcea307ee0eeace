"""A run on the disk: what was asked for, the measurements, the weights.

Network and schedule are written in the words of diffusers' configs, as `interop` reads them.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm import __version__
from jax_ddpm.cli.config import ScheduleName, TrainConfig, UsageError
from jax_ddpm.interop.diffusers import Pretrained, load_diffusers, unet_config, unet_from_config
from jax_ddpm.interop.scheduler import Scheduler, scheduler_config, scheduler_from_config
from jax_ddpm.io.arrays import flatten, unflatten
from jax_ddpm.io.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from jax_ddpm.io.files import new_folder
from jax_ddpm.io.json import write_json
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
    "CHECKPOINTS",
    "PICTURES",
    "Run",
    "describe",
    "init_variables",
    "is_run",
    "load_model",
    "load_pretrained",
    "load_run",
    "named_schedule",
    "save_run",
]

CHECKPOINTS = "checkpoints"
"""The folder in a run that holds them."""

PICTURES = ("loss.png", "forward.png", "samples.png", "reverse.gif")
"""What a run shows of its last weights."""

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


def describe(run: Run, settings: TrainConfig | None = None, data: Any = None) -> dict[str, Any]:
    """What is no array of a run, as JSON: a run's config.json, and in each of its checkpoints."""
    model = run.pretrained.model
    if isinstance(model, UNet):
        network = unet_config(model)
    else:
        network = {"_class_name": "SimpleUNet", "channels": model.channels}
    description = {
        "model": network,
        "scheduler": scheduler_config(Scheduler(*run.pretrained[2:])),
        "image_shape": run.image_shape,
        "num_classes": run.num_classes,
        "null_label": run.null_label,
        "guidance": run.guidance,
        "train": settings and asdict(settings),
        "data": data,
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    return json.loads(json.dumps(description, default=str))


def save_run(folder: Path, run: Run) -> None:
    """Write a run of one checkpoint, in a new folder: its weights are their own average."""
    description, weights = describe(run), run.pretrained.variables
    arrays = {"params": weights, "ema": weights}
    with new_folder(folder) as new:
        try:
            save_checkpoint(new / CHECKPOINTS, 0, arrays, {"run": description})
        except ValueError as error:
            raise UsageError(str(error)) from None
        write_json(new / "config.json", description)


def is_run(folder: Path) -> bool:
    """Whether `folder` looks like a run, or one of its checkpoints, damaged or not."""
    return (folder / CHECKPOINTS).is_dir() or _is_checkpoint(folder)


def load_run(folder: Path, weights: str = "ema", step: int | None = None) -> Run:
    """Read a run's newest checkpoint, or that of `step`, or the one whose folder this is.

    Raises `UsageError` naming what is missing, damaged or does not fit.
    """
    alone = step is None and _is_checkpoint(folder)
    path = folder if alone else _find_checkpoint(folder, step)
    try:
        return _read_run(path, weights)
    except ValueError as error:
        older = [each for each in list_checkpoints(path.parent) if int(each.name) < int(path.name)]
        hint = "there is no older one"
        if older:
            before = older[-1] if alone else f"--checkpoint {int(older[-1].name)}"
            hint = f"the one before: {before}"
        raise UsageError(f"{_line(error)}; {hint}") from None


def _is_checkpoint(folder: Path) -> bool:
    return folder.parent.name == CHECKPOINTS and folder in list_checkpoints(folder.parent)


def _find_checkpoint(folder: Path, step: int | None = None) -> Path:
    """The newest of a run, or that of `step`."""
    if not (folder / CHECKPOINTS).is_dir():
        is_diffusers = (folder / "model_index.json").exists()
        hint = ": a folder of diffusers, for --pretrained" if is_diffusers else ""
        raise UsageError(f"expected a run's folder, got {folder} (no {CHECKPOINTS}/ in it){hint}")
    paths = {int(path.name): path for path in list_checkpoints(folder / CHECKPOINTS)}
    if not paths:
        raise UsageError(f"{folder} has no checkpoint yet: train on with the command it began with")
    if step is not None and step not in paths:
        raise UsageError(
            f"--checkpoint: expected one of {', '.join(map(str, paths))} in {folder}, got {step}"
        )
    return paths[max(paths) if step is None else step]


def _read_run(path: Path, weights: str) -> Run:
    checkpoint = load_checkpoint(path)
    try:
        description = checkpoint.state["run"]
        height, width, channels = description["image_shape"]
        model = _model(description["model"], path / "state.json")
        scheduler = scheduler_from_config(description["scheduler"], path / "state.json")
        labelling = [description[name] for name in ("num_classes", "null_label", "guidance")]
        image_shape = (height, width, channels)
        flat = checkpoint.arrays[weights]
        expected = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), image_shape))
    except (KeyError, TypeError, ValueError, UsageError) as error:
        raise ValueError(f"{path}: expected a run's checkpoint: {_line(error)}") from None
    # Weights that came from elsewhere keep their dtype.
    template = {
        name: jax.ShapeDtypeStruct(leaf.shape, flat[name].dtype if name in flat else leaf.dtype)
        for name, leaf in flatten(expected).items()
    }
    try:
        variables = restore(unflatten(template), flat)
    except ValueError as error:
        raise ValueError(f"{path / weights}.safetensors: {error}") from None
    return Run(Pretrained(model, variables, *scheduler), image_shape, *labelling)


def load_pretrained(folder: Path) -> Run:
    """Read a folder of diffusers. Raises `UsageError` naming what is missing or does not fit."""
    if is_run(folder):
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


def load_model(folder: Path, weights: str = "ema") -> Run:
    """A run, one of its checkpoints or a folder of diffusers, whichever `folder` is."""
    if not is_run(folder):
        return load_pretrained(folder)
    # By its own folder: there may be no --checkpoint to name another with.
    return load_run(folder if _is_checkpoint(folder) else _find_checkpoint(folder), weights)


def _model(content: Mapping[str, Any], path: Path) -> UNet | SimpleUNet:
    if content.get("_class_name") == "SimpleUNet":
        return SimpleUNet(channels=content["channels"])
    return unet_from_config(content, path)


def _line(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else str(error).partition("\n")[0]
