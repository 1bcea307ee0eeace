"""A run on the disk and what is done with it: the library that the command line is made of.

    data = load_dataset("digits")                          # jax_ddpm.data
    end = fit("runs/digits", data, Settings(steps=1500))   # again: it resumes
    run = load_run("runs/digits")
    save_grid("sevens.png", draw(jax.random.key(0), run, 10, labels=7))

Nothing in here prints or ends the process. What is wrong with a setting is a `FieldError`, a
`ValueError` that names it; what cannot be written is an `OSError`.
"""

from jax_ddpm._errors import FieldError
from jax_ddpm.runs.drawing import draw
from jax_ddpm.runs.evaluating import evaluate, evaluate_samples
from jax_ddpm.runs.exporting import export
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
from jax_ddpm.runs.recipes import RECIPES, Recipe, unet_fields
from jax_ddpm.runs.resume import Findings, check_run, load_state, save_state
from jax_ddpm.runs.settings import Settings
from jax_ddpm.runs.training import Fit, fit

__all__ = [
    "RECIPES",
    "FieldError",
    "Findings",
    "Fit",
    "Progress",
    "Recipe",
    "Settings",
    "check_run",
    "draw",
    "evaluate",
    "evaluate_samples",
    "export",
    "fit",
    "load_model",
    "load_run",
    "load_state",
    "read_metrics",
    "save_forward",
    "save_gif",
    "save_grid",
    "save_loss",
    "save_pictures",
    "save_run",
    "save_samples",
    "save_state",
    "unet_fields",
]
