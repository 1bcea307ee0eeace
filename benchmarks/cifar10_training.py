"""`ddpm_cifar10`, 35.7 M parameters: the training step (Adam) against the same in torch.

JAX's step also keeps the average of the weights and the gradient's norm; torch's has neither. The
comparison runs two steps on the same weights and noise and looks at the losses.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
import torch.nn.functional as F

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.compare import check_agreement
from benchmarks.settings import Settings
from benchmarks.timing import interleave, timed
from jax_ddpm.training import draw_step

__all__ = ["TOLERANCE", "run"]

TOLERANCE = 1e-3
"""Of the losses of two steps, float32; measured 1e-5."""

_LEARNING_RATE = 2e-4


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time every contender at every batch size; raises `Disagreement` if losses differ."""
    rows = []
    for batch in settings.cifar10_training_batches:
        rows += _run_batch(settings, batch, log)
    return rows


def _run_batch(settings: Settings, batch: int, log: Callable[[str], None]) -> list[dict[str, Any]]:
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    optimizer = optax.adam(_LEARNING_RATE)
    model, variables = sides.cifar10_jax()
    images = np.asarray(jax.random.normal(jax.random.key(1), (batch, 32, 32, 3)))
    state = ddpm.init_train_state(jax.random.key(0), variables, optimizer)
    drawn = [
        draw_step(state._replace(step=jax.numpy.int32(number)), schedule, images)
        for number in range(2)
    ]

    outputs, runs, compile_s = {}, {}, {}
    shardings = {sides.JAX_PLAIN: None, sides.JAX_SHARDED: sides.data_sharding(batch)}
    if shardings[sides.JAX_SHARDED] is None:
        del shardings[sides.JAX_SHARDED]
    step = ddpm.make_train_step(schedule, model.apply, optimizer)
    for name, sharding in shardings.items():
        trainer, compile_s[name] = timed(partial(sides.JaxTrainer, step, state, images, sharding))
        outputs[name] = np.array(trainer.run(2))
        runs[name] = partial(trainer.run, 1)

    for name, (channels_last, wrap) in sides.torch_contenders(large=True).items():
        trainer = _TorchTrainer(wrap, images, channels_last, schedule)
        given = [
            (torch.from_numpy(np.array(t)), sides.nchw(noise, channels_last)) for t, noise in drawn
        ]
        first, seconds = timed(partial(trainer.run, *given[0]))
        outputs[name] = np.array([first, trainer.run(*given[1])])
        compile_s[name] = seconds if name.startswith("torch.compile") else None
        runs[name] = trainer.run

    differences = check_agreement(outputs, sides.REFERENCE, TOLERANCE)
    log(f"ddpm_cifar10 step, batch {batch}: same loss to {max(differences.values()):.1e}; timing …")
    times = interleave(runs, settings.cifar10_rounds)
    devices = {name: sides.devices_of(shardings.get(name)) for name in runs}
    return sides.rows(batch, 1, times, devices, differences, compile_s)


class _TorchTrainer:
    def __init__(self, wrap: Callable, images: np.ndarray, channels_last: bool, schedule) -> None:
        network = sides.cifar10_torch(channels_last)
        self.optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE, fused=True)
        self.images, self.channels_last = sides.nchw(images, channels_last), channels_last
        signal, deviation = (
            torch.from_numpy(table.astype(np.float32)).to(sides.torch_device())
            for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
        )

        def loss(x_start, t, noise):
            scale = signal[t][:, None, None, None], deviation[t][:, None, None, None]
            return F.mse_loss(noise, network(scale[0] * x_start + scale[1] * noise, t).sample)

        self.loss = wrap(loss)

    def run(self, t: torch.Tensor | None = None, noise: torch.Tensor | None = None) -> float:
        batch = len(self.images)
        if t is None or noise is None:
            t = torch.randint(0, 1000, (batch,))
            noise = sides.draw(batch, 32, self.channels_last)
        loss = self.loss(self.images, t.to(sides.torch_device()), noise)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        sides.synchronize()
        return value
