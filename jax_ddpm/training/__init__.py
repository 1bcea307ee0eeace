"""Training: the pure step and its state, sharding over devices, and several hosts."""

from jax_ddpm.training.state import (
    TrainState,
    draw_step,
    ema_warmup,
    init_train_state,
    make_train_step,
)

__all__ = [
    "TrainState", "draw_step", "ema_warmup", "init_train_state", "make_train_step",
]  # fmt: skip
