"""A run on the disk: what was asked for, the measurements, the weights."""

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
from jax_ddpm.models import SimpleUNet
from jax_ddpm.schedule import (
    NoiseSchedule,
    cosine_beta_schedule,
    linear_beta_schedule,
    make_schedule,
    scaled_linear_beta_schedule,
    sigmoid_beta_schedule,
)

__all__ = ["Run", "create_run", "load_run", "named_schedule", "save_weights", "write_text"]

_BETAS = {
    "linear": linear_beta_schedule,
    "scaled_linear": scaled_linear_beta_schedule,
    "cosine": cosine_beta_schedule,
    "sigmoid": sigmoid_beta_schedule,
}


class Run(NamedTuple):
    """A trained run: everything that sampling needs."""

    model: SimpleUNet
    variables: dict[str, Any]
    """The average of the weights (EMA)."""
    schedule: NoiseSchedule
    image_shape: tuple[int, int, int]


def named_schedule(name: ScheduleName, timesteps: int) -> NoiseSchedule:
    """The schedule that a run's config names."""
    return make_schedule(_BETAS[name](timesteps))


def create_run(config: TrainConfig, image_shape: tuple[int, ...]) -> Path:
    """Make the run's folder and its config.json. Refuses a folder that holds anything."""
    folder = config.out / config.name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--name: {folder} exists already: choose another name, or remove it")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out: cannot write {folder}: {error.strerror}") from None
    settings = {name: value for name, value in asdict(config).items() if name not in ("out",)}
    settings["data"] = None if config.data is None else str(config.data)
    description = {
        "model": "SimpleUNet",
        "image_shape": list(image_shape),
        "train": settings,
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__, "numpy": np.__version__},
    }
    write_text(folder / "config.json", json.dumps(description, indent=2) + "\n")
    return folder


def save_weights(folder: Path, params: Mapping[str, Any], ema_params: Mapping[str, Any]) -> None:
    """Write the run's weights, and their average, which is what samples are drawn from."""
    save_arrays(folder / "params.safetensors", params)
    save_arrays(folder / "ema.safetensors", ema_params)


def load_run(folder: Path) -> Run:
    """Read a run. Raises `UsageError` naming what is missing or does not fit."""
    path = folder / "config.json"
    if not path.is_file():
        raise UsageError(f"--run: expected a run's folder, got {folder} (no config.json in it)")
    try:
        description = json.loads(path.read_text())
        height, width, channels = description["image_shape"]
        settings = description["train"]
        schedule = named_schedule(settings["schedule"], settings["timesteps"])
        if description["model"] != "SimpleUNet":
            raise ValueError(f"unknown model {description['model']}")
        model = SimpleUNet(channels=channels)
        expected = jax.eval_shape(
            model.init,
            jax.random.key(0),
            jnp.zeros((1, height, width, channels)),
            jnp.zeros((1,), jnp.int32),
        )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--run: {path} is not a run's config: {error!r}") from None
    try:
        variables = load_arrays(folder / "ema.safetensors")
        _check_tree(folder / "ema.safetensors", variables, expected)
    except ValueError as error:
        raise UsageError(f"--run: {error}") from None
    return Run(model, variables, schedule, (height, width, channels))


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _check_tree(path: Path, variables: Any, expected: Any) -> None:
    got = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in _leaves(variables)}
    want = {jax.tree_util.keystr(k, simple=True, separator="/"): v for k, v in _leaves(expected)}
    for name in sorted(got.keys() | want.keys()):
        if name not in got:
            raise ValueError(f"{path}: expected an array {name}, got none")
        if name not in want:
            raise ValueError(f"{path}: expected only the model's arrays, got {name}")
        if got[name].shape != want[name].shape or got[name].dtype != want[name].dtype:
            raise ValueError(
                f"{path}: expected {name} as {want[name].dtype}{list(want[name].shape)}, "
                f"got {got[name].dtype}{list(got[name].shape)}"
            )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_leaves_with_path(tree)
