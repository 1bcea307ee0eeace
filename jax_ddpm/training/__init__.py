"""Training: the pure step and its state, sharding over devices, and several hosts."""

from jax_ddpm.training.state import TrainState as TrainState
from jax_ddpm.training.state import draw_step as draw_step
from jax_ddpm.training.state import ema_warmup as ema_warmup
from jax_ddpm.training.state import init_train_state as init_train_state
from jax_ddpm.training.state import make_train_step as make_train_step
