"""The tutorial's training step (Adam, learning rate 1e-3): milliseconds for each step.

JAX's step also keeps the average of the weights and the gradient's norm; torch's is the
tutorial's, which has neither. The comparison runs a few steps on the same weights and noise and
looks at the losses. For the times, each side draws its own noise, and waits for every step's loss.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax.sharding import NamedSharding
from torch import Tensor

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.compare import check_agreement
from benchmarks.settings import Settings
from benchmarks.timing import interleave, timed
from jax_ddpm.training import draw_step
from torch_reference.schedule import T, tables

__all__ = ["TOLERANCE", "run"]

TOLERANCE = 1e-3
"""Of the losses of three steps, float32: DESIGN's number for Adam steps; measured 1e-6."""

_LEARNING_RATE = 1e-3
_COMPARED_STEPS = 3

Draw = tuple[Tensor, Tensor]


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if losses differ."""
    rows = []
    for batch in settings.training_batches:
        rows += _run_batch(settings, batch, log)
    return rows


def _run_batch(settings: Settings, batch: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    steps, size = settings.training_steps, settings.image_size
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    optimizer = optax.adam(_LEARNING_RATE)
    images = np.asarray(jax.random.normal(jax.random.key(1), (batch, size, size, 3)))
    state = ddpm.init_train_state(jax.random.key(0), sides.jax_variables(), optimizer)

    outputs: dict[str, np.ndarray] = {}
    runs: dict[str, Callable[[], object]] = {}
    compile_s: dict[str, float | None] = {}

    # Torch gets what JAX's steps will draw.
    drawn = []
    for number in range(_COMPARED_STEPS):
        numbered = state._replace(step=jax.numpy.asarray(number, jax.numpy.int32))
        drawn.append(draw_step(numbered, schedule, jax.numpy.asarray(images)))

    shardings: dict[str, NamedSharding | None] = {sides.JAX_PLAIN: None}
    if sharding := sides.data_sharding(batch):
        shardings[sides.JAX_SHARDED] = sharding
    else:
        log(f"training, batch {batch}: not sharded (one device, or a batch that cannot be split)")

    step_fn = ddpm.make_train_step(schedule, sides.apply_fn, optimizer)
    for name, sharding in shardings.items():
        trainer, compile_s[name] = timed(
            partial(sides.JaxTrainer, step_fn, state, images, sharding)
        )
        outputs[name] = np.array(trainer.run(_COMPARED_STEPS))
        runs[name] = partial(trainer.run, steps)

    for name, (channels_last, wrap) in sides.torch_contenders().items():
        trainer = _TorchTrainer(wrap, images, channels_last)
        given = [
            (
                torch.from_numpy(np.array(t)).to(sides.torch_device()),
                sides.nchw(noise, channels_last),
            )
            for t, noise in drawn
        ]
        first, seconds = timed(partial(trainer.run, given[:1]))
        outputs[name] = np.array(first + trainer.run(given[1:]))
        compile_s[name] = seconds if name.startswith("torch.compile") else None
        runs[name] = partial(trainer.run, [None] * steps)

    differences = check_agreement(outputs, sides.REFERENCE, TOLERANCE)
    log(f"training, batch {batch}: same losses to {max(differences.values()):.1e}; timing …")
    times = interleave(runs, settings.rounds)
    devices = {name: sides.devices_of(shardings.get(name)) for name in runs}
    return sides.rows(batch, steps, times, devices, differences, compile_s)


class _TorchTrainer:
    def __init__(self, wrap: Callable, images: np.ndarray, channels_last: bool) -> None:
        network = sides.torch_network(channels_last)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE, fused=True)
        self.images, self.channels_last = sides.nchw(images, channels_last), channels_last
        self.loss = wrap(_torch_loss(network))

    def run(self, drawn: Sequence[Draw | None]) -> list[float]:
        losses = []
        for given in drawn:
            t, noise = given or self._draw()
            loss = self.loss(self.images, t, noise)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
            sides.synchronize()
        return losses

    def _draw(self) -> Draw:
        batch, _, _, size = self.images.shape
        t = torch.randint(0, T, (batch,), device=sides.torch_device())
        return t, sides.draw(batch, size, self.channels_last)


def _torch_loss(network: torch.nn.Module) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    terms = tables()
    signal = terms.sqrt_alphas_cumprod.to(sides.torch_device())
    deviation = terms.sqrt_one_minus_alphas_cumprod.to(sides.torch_device())

    def loss(x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        def at(vals: Tensor) -> Tensor:
            return vals[t][:, None, None, None]

        return F.mse_loss(noise, network(at(signal) * x_start + at(deviation) * noise, t))

    return loss
