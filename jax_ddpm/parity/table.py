"""Every certified case, in the order in which the report prints them."""

from jax_ddpm.parity.losses import LOSS_CASES
from jax_ddpm.parity.maths import MATHS_CASES
from jax_ddpm.parity.openai import OPENAI_CASES
from jax_ddpm.parity.tutorial import TUTORIAL_CASES
from jax_ddpm.parity.unet import UNET_CASES

CASES = (*MATHS_CASES, *LOSS_CASES, *TUTORIAL_CASES, *UNET_CASES, *OPENAI_CASES)
