"""Runs, the folders of `jax-ddpm train`: train, resume, sample, evaluate, export.

Nothing here prints or ends the process.
"""

from jax_ddpm._errors import FieldError
from jax_ddpm.runs.drawing import draw, export
from jax_ddpm.runs.evaluating import evaluate, evaluate_samples
from jax_ddpm.runs.figures import (
    save_forward,
    save_gif,
    save_grid,
    save_loss,
    save_pictures,
    save_samples,
)
from jax_ddpm.runs.metrics import Progress, read_metrics
from jax_ddpm.runs.model import load_model, load_run, save_run
from jax_ddpm.runs.recipes import RECIPES
from jax_ddpm.runs.resume import check_run, load_state, save_state
from jax_ddpm.runs.settings import Settings
from jax_ddpm.runs.training import Fit, fit

__all__ = [
    # train
    "fit", "Settings", "RECIPES", "Fit", "Progress", "read_metrics", "FieldError",
    # open, draw, evaluate, export
    "load_run", "load_model", "draw", "evaluate", "evaluate_samples", "export",
    # files
    "save_run", "check_run", "save_state", "load_state", "save_samples", "save_grid", "save_gif",
    "save_forward", "save_loss", "save_pictures",
]  # fmt: skip
