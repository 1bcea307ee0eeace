"""What each command can be told. Fields become flags; docstrings become their help."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["ParityConfig", "SampleConfig", "ScheduleName", "TrainConfig", "UsageError", "positive"]

ScheduleName = Literal["linear", "scaled_linear", "cosine", "sigmoid"]


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that names the flag."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a model on images and draw samples from it."""

    name: str = "digits"
    """Name of the run."""
    out: Path = Path("runs")
    """Folder of runs: this one is written to OUT/NAME."""
    data: Path | None = None
    """Images to learn: a .npz or .npy of [image, height, width(, channel)], uint8 or float in
    [0, 1] or [-1, 1], or a folder of pictures of one size. Default: scikit-learn's 8x8 digits."""
    steps: int = 8000
    """Training steps."""
    batch_size: int = 64
    """Images a step."""
    learning_rate: float = 2e-3
    """Adam's, at the start; it falls to 0 along a cosine."""
    timesteps: int = 200
    """T, the steps of the noising chain."""
    schedule: ScheduleName = "cosine"
    """The noise schedule."""
    ema_decay: float = 0.999
    """Decay of the average of the weights, which is what samples are drawn from."""
    grad_clip: float = 1.0
    """Gradients are scaled down to this global norm."""
    seed: int = 0
    """Decides the initial weights, the order of the data, the noise and the samples."""


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Draw samples from a trained run."""

    run: Path
    """Folder of the run, as `jax-ddpm train` made it."""
    num: int = 64
    """How many images."""
    steps: int = 50
    """Steps of the reverse chain, at most the run's timesteps."""
    sampler: Literal["ddim", "ancestral"] = "ddim"
    """The update rule."""
    spacing: Literal["leading", "trailing", "linspace"] = "trailing"
    """Which timesteps the chain keeps."""
    seed: int = 0
    """Image k of a seed is the same however many are drawn."""
    batch_size: int = 256
    """Images drawn at a time."""
    out: Path = Path("samples.png")
    """A .png (a grid) or a .npz (`samples`, float32 in [-1, 1], NHWC). Written over."""


@dataclass(frozen=True, kw_only=True)
class ParityConfig:
    """Compare every function with PyTorch and print the certified errors."""

    json: Path | None = None
    """Also write the table to this file, as JSON."""


def positive(config: TrainConfig | SampleConfig, *names: str) -> None:
    """Raises `UsageError` unless these fields of `config` are above zero."""
    for name in names:
        if not getattr(config, name) > 0:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: expected more than 0, got {getattr(config, name)}")
