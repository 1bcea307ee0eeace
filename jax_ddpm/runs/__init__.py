"""A run on the disk and what is done with it: the library that the command line is made of.

Nothing in here prints or ends the process. README.md, beside this file, has an example.
"""

from jax_ddpm._errors import FieldError as FieldError
from jax_ddpm.runs.drawing import draw as draw
from jax_ddpm.runs.drawing import export as export
from jax_ddpm.runs.evaluating import evaluate as evaluate
from jax_ddpm.runs.evaluating import evaluate_samples as evaluate_samples
from jax_ddpm.runs.figures import save_forward as save_forward
from jax_ddpm.runs.figures import save_gif as save_gif
from jax_ddpm.runs.figures import save_grid as save_grid
from jax_ddpm.runs.figures import save_loss as save_loss
from jax_ddpm.runs.figures import save_pictures as save_pictures
from jax_ddpm.runs.figures import save_samples as save_samples
from jax_ddpm.runs.metrics import Progress as Progress
from jax_ddpm.runs.metrics import read_metrics as read_metrics
from jax_ddpm.runs.model import load_model as load_model
from jax_ddpm.runs.model import load_run as load_run
from jax_ddpm.runs.model import save_run as save_run
from jax_ddpm.runs.recipes import RECIPES as RECIPES
from jax_ddpm.runs.recipes import Recipe as Recipe
from jax_ddpm.runs.recipes import unet_fields as unet_fields
from jax_ddpm.runs.resume import Findings as Findings
from jax_ddpm.runs.resume import check_run as check_run
from jax_ddpm.runs.resume import load_state as load_state
from jax_ddpm.runs.resume import save_state as save_state
from jax_ddpm.runs.settings import Settings as Settings
from jax_ddpm.runs.training import Fit as Fit
from jax_ddpm.runs.training import fit as fit
