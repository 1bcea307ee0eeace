"""Training: the pure step and its state, the order of the data, where arrays live."""

from jax_ddpm.data import batch_indices as batch_indices
from jax_ddpm.data import load_batch as load_batch
from jax_ddpm.training.state import TrainState as TrainState
from jax_ddpm.training.state import draw_step as draw_step
from jax_ddpm.training.state import ema_warmup as ema_warmup
from jax_ddpm.training.state import init_train_state as init_train_state
from jax_ddpm.training.state import make_train_step as make_train_step

__all__ = [
    "TrainState",
    "batch_indices",
    "draw_step",
    "ema_warmup",
    "init_train_state",
    "load_batch",
    "make_train_step",
]
