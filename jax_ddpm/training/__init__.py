"""Training: the pure step and its state, sharding over devices, and several hosts."""

from jax_ddpm.training.hosts import connect
from jax_ddpm.training.sharding import data_sharding, device_mesh, state_sharding
from jax_ddpm.training.state import (
    TrainState,
    draw_step,
    ema_warmup,
    init_train_state,
    make_train_step,
)

__all__ = [
    "TrainState", "init_train_state", "make_train_step", "draw_step", "ema_warmup",
    "connect", "device_mesh", "data_sharding", "state_sharding",
]  # fmt: skip
