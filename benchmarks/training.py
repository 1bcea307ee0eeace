"""The training step, of the tutorial's network and of any other: milliseconds for each step.

Both sides compute loss, gradient and its norm, Adam's step, and the average of the weights (Ho et
al. 2020, §4). A timed run of JAX's is one scan, as a loop of one's own would be; torch's is the
loop that its users write, with its own fused functions. The comparison looks at the losses of the
first few steps, on the same weights and noise. For the times, each side draws its own noise.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.settings import Settings
from benchmarks.timing import timed
from jax_ddpm.training import draw_step
from torch_reference.schedule import T

__all__ = ["run", "run_batch"]

TOLERANCE = 1e-3
"""Of the losses of three steps, float32: DESIGN's number for Adam steps; measured 4e-5."""

_COMPARED_STEPS = 3

_average = get_ema_multi_avg_fn(0.9999)
"""`(average, parameters, number)`, in place."""

Draw = tuple[Tensor, Tensor]


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The tutorial's step, at every batch size; raises `Disagreement` if losses differ."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))
    return [
        row
        for batch in settings.training_batches
        for row in run_batch(
            sides.TUTORIAL,
            schedule,
            batch,
            1e-3,
            max(_COMPARED_STEPS, settings.training_steps // batch),
            settings.rounds,
            log,
        )
    ]


def run_batch(
    network: sides.Network,
    schedule: ddpm.NoiseSchedule,
    batch: int,
    learning_rate: float,
    steps: int,
    rounds: int,
    log: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Every contender's rows at one batch size; `steps` of a timed run, 3 or more."""
    optimizer, shape = optax.adam(learning_rate), (batch, *network.image_shape)
    images = np.asarray(jax.random.normal(jax.random.key(1), shape))
    state = ddpm.init_train_state(jax.random.key(0), network.variables(), optimizer)

    # Torch gets what JAX's steps will draw.
    drawn = []
    for number in range(_COMPARED_STEPS):
        numbered = state._replace(step=jax.numpy.asarray(number, jax.numpy.int32))
        drawn.append(draw_step(numbered, schedule, jax.numpy.asarray(images)))

    race = sides.Race(f"{network.name} training, batch {batch}", TOLERANCE, log)
    step_fn = ddpm.make_train_step(schedule, network.apply_fn, optimizer)
    for name, sharding in sides.jax_contenders(batch).items():
        start = partial(sides.JaxTrainer, step_fn, state, images, sharding, steps)
        trainer, seconds = timed(start)
        output = np.array(trainer.run(steps)[:_COMPARED_STEPS])
        race.enter(name, partial(trainer.run, steps), output, seconds, sharding)

    for name, (channels_last, wrap) in sides.torch_contenders(large=network.large).items():
        trainer = _TorchTrainer(network, schedule, wrap, images, channels_last, learning_rate)
        given = [
            (
                torch.from_numpy(np.array(t)).to(sides.torch_device()),
                sides.nchw(noise, channels_last),
            )
            for t, noise in drawn
        ]
        first, seconds = timed(partial(trainer.run, given[:1]))
        output = np.array(first + trainer.run(given[1:]))
        race.enter(name, partial(trainer.run, [None] * steps), output, seconds)
    return race.run(batch, steps, rounds)


class _TorchTrainer:
    def __init__(
        self,
        network: sides.Network,
        schedule: ddpm.NoiseSchedule,
        wrap: Callable,
        images: np.ndarray,
        channels_last: bool,
        learning_rate: float,
    ) -> None:
        module = network.torch_module(channels_last)
        self.parameters = list(module.parameters())
        self.average = [parameter.detach().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.Adam(self.parameters, lr=learning_rate, fused=True)
        self.images, self.channels_last = sides.nchw(images, channels_last), channels_last
        self.timesteps = schedule.num_timesteps
        self.loss = wrap(_torch_loss(partial(network.torch_output, module), schedule))

    def run(self, drawn: Sequence[Draw | None]) -> list[float]:
        losses = []
        for given in drawn:
            t, noise = given or self._draw()
            loss = self.loss(self.images, t, noise)
            self.optimizer.zero_grad()
            loss.backward()
            get_total_norm([each.grad for each in self.parameters if each.grad is not None])
            self.optimizer.step()
            _average(self.average, self.parameters, 0)
            losses.append(loss.item())
            sides.synchronize()
        return losses

    def _draw(self) -> Draw:
        batch, _, _, size = self.images.shape
        t = torch.randint(0, self.timesteps, (batch,), device=sides.torch_device())
        return t, sides.draw(batch, size, self.channels_last)


def _torch_loss(
    network: Callable[[Tensor, Tensor], Tensor], schedule: ddpm.NoiseSchedule
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    signal, deviation = (
        torch.from_numpy(table.astype(np.float32)).to(sides.torch_device())
        for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )

    def loss(x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        def at(vals: Tensor) -> Tensor:
            return vals[t][:, None, None, None]

        return F.mse_loss(noise, network(at(signal) * x_start + at(deviation) * noise, t))

    return loss
