"""The programs that are compared: JAX's and torch's, with the same weights, on the same device.

Both have a reverse loop and a training step. torch's training step is the one that its users write,
with its own fused functions.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn

import jax_ddpm as ddpm
from benchmarks.harness import on_gpu
from benchmarks.networks import Network, memory_format, torch_device
from jax_ddpm.training import TrainState, draw_step
from jax_ddpm.training.sharding import data_sharding, device_mesh
from torch_reference.schedule import T, tables

__all__ = [
    "JAX_SHARDED",
    "REFERENCE",
    "JaxTrainer",
    "TorchTrainer",
    "chain",
    "draw",
    "drawn_by_jax",
    "images",
    "jax_contenders",
    "jax_loop",
    "jax_training",
    "nchw",
    "nhwc",
    "over_cores",
    "reverse_loop",
    "synchronize",
    "torch_contenders",
    "torch_loop",
    "torch_step",
    "whole",
]

JAX_PLAIN = "JAX jit"
JAX_SHARDED = "JAX jit, sharded over cores"
REFERENCE = "torch eager"
_LAYOUTS = {REFERENCE: False, "torch eager, channels_last": True}
_COMPILED = {"torch.compile": False, "torch.compile, channels_last": True}

_average = get_ema_multi_avg_fn(0.9999)
"""`(average, parameters, number)`, in place."""

Draw = tuple[Tensor, Tensor]
Step = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`(x_t, t, noise) -> x_{t-1}`"""


def chain(steps: int, timesteps: int = T) -> ddpm.NoiseSchedule:
    """The last few steps of a chain: each costs the same."""
    return ddpm.respace(ddpm.make_schedule(ddpm.linear_beta_schedule(timesteps)), range(steps))


def reverse_loop(
    network: Network,
    schedule: ddpm.NoiseSchedule,
    shape: tuple[int, ...],
    sharding: NamedSharding | None = None,
    **policy: Any,
) -> Any:
    """`(key, variables) -> images`, jitted: JAX's reverse loop of the whole `schedule`."""

    @jax.jit
    def loop(key, variables):
        denoise_fn = partial(network.apply_fn, variables)
        return ddpm.p_sample_loop(key, schedule, denoise_fn, shape, sharding=sharding, **policy)

    return loop


def jax_loop(
    network: Network,
    schedule: ddpm.NoiseSchedule,
    shape: tuple[int, ...],
    sharding: NamedSharding | None,
    **policy: Any,
) -> Callable[[], jax.Array]:
    """`reverse_loop`, compiled; from `key(0)`."""
    arguments = jax.device_put((jax.random.key(0), network.variables()), whole(sharding))
    loop = reverse_loop(network, schedule, shape, sharding, **policy)
    program = loop.lower(*arguments).compile()
    return lambda: jax.block_until_ready(program(*arguments))


def jax_training(
    network: Network, schedule: ddpm.NoiseSchedule, batch: int, learning_rate: float
) -> tuple[Callable, TrainState, np.ndarray]:
    """JAX's training step (Adam), its first state, and images: what a `JaxTrainer` takes."""
    optimizer = optax.adam(learning_rate)
    state = ddpm.init_train_state(jax.random.key(0), network.variables(), optimizer)
    step = ddpm.make_train_step(schedule, network.apply_fn, optimizer)
    return step, state, images(network, batch)


def images(network: Network, batch: int) -> np.ndarray:
    """What both sides train on."""
    return np.asarray(jax.random.normal(jax.random.key(1), (batch, *network.image_shape)))


class JaxTrainer:
    """A training step, `per_dispatch` of them in a scan, compiled with its state donated."""

    def __init__(
        self,
        step: Callable,
        state: TrainState,
        images: Any,
        sharding: NamedSharding | None,
        per_dispatch: int = 1,
    ) -> None:
        self.images = jax.device_put(images, sharding or whole(None))
        # A copy, since it is donated.
        self.state = jax.device_put(jax.tree.map(jnp.copy, state), whole(sharding))
        self.per_dispatch = per_dispatch

        @partial(jax.jit, donate_argnums=0)
        def steps(state, images):
            return lax.scan(lambda state, _: step(state, images), state, length=per_dispatch)

        self.program = steps.lower(self.state, self.images).compile()

    def run(self, steps: int) -> list[float]:
        """Train for a multiple of `per_dispatch` steps, waiting for the losses of each dispatch."""
        losses = []
        for _ in range(steps // self.per_dispatch):
            self.state, metrics = self.program(self.state, self.images)
            jax.block_until_ready(self.state)
            losses += np.asarray(metrics["loss"]).tolist()
        return losses


def jax_contenders(batch: int) -> dict[str, NamedSharding | None]:
    """Plain and, where the batch splits over CPU devices, sharded."""
    contenders: dict[str, NamedSharding | None] = {JAX_PLAIN: None}
    if (sharding := over_cores(batch)) and not on_gpu():
        contenders[JAX_SHARDED] = sharding
    return contenders


def over_cores(batch: int) -> NamedSharding | None:
    """The batch over as many devices as divide it, if that is more than one."""
    mesh = device_mesh(batch)
    return data_sharding(mesh) if mesh.size > 1 else None


def whole(sharding: NamedSharding | None) -> Any:
    """Where weights live beside a batch under `sharding`."""
    if sharding is None:
        return jax.devices()[0]
    return NamedSharding(sharding.mesh, PartitionSpec())


def torch_contenders(*, large: bool = False) -> dict[str, tuple[bool, Callable]]:
    """Each torch contender: whether it is channels_last, and what wraps its functions.

    A `large` network is compiled in one layout only, since that takes a minute.
    """
    # One program for each batch size: torch would turn to symbolic shapes at the second, and
    # past its limit of recompilations to eager, without a word.
    torch.compiler.reset()

    def compiled(function: Callable) -> Callable:
        return torch.compile(function, dynamic=False)

    contenders: dict[str, tuple[bool, Callable]] = {
        name: (channels_last, lambda function: function) for name, channels_last in _LAYOUTS.items()
    }
    layouts = {name: last for name, last in _COMPILED.items() if last or not large}
    return contenders | {name: (last, compiled) for name, last in layouts.items()}


def torch_step(network: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """`torch_reference.sampling.sample_timestep` in a form that torch.compile takes whole.

    It never looks at the value of t (the last step's variance is zero), and gathers on the device.
    """
    terms = tables()
    scale = terms.sqrt_recip_alphas.to(torch_device())
    weight = (terms.betas / terms.sqrt_one_minus_alphas_cumprod).to(torch_device())
    deviation = terms.posterior_variance.sqrt().to(torch_device())

    def step(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        mean = _at(scale, t) * (x - _at(weight, t) * network(x, t))
        return mean + _at(deviation, t) * noise

    return step


@torch.no_grad()
def torch_loop(step: Step, noise_fn: Callable[[int], Tensor], steps: int) -> Tensor:
    """The last `steps` steps of a chain; `noise_fn(steps)` is its start, as in JAX's loop."""
    x = noise_fn(steps)
    for entry in reversed(range(steps)):
        t = torch.full((x.shape[0],), entry, device=x.device)
        x = step(x, t, noise_fn(entry))
    synchronize()
    return x


class TorchTrainer:
    """Loss, gradient and its norm, Adam's step, the average of the weights; `wrap`s the loss."""

    def __init__(
        self,
        network: Network,
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
        self.images, self.channels_last = nchw(images, channels_last), channels_last
        self.timesteps = schedule.num_timesteps
        self.loss = wrap(_torch_loss(partial(network.torch_output, module), schedule))

    def run(self, drawn: Sequence[Draw | None]) -> list[float]:
        """The loss of each step, with the t and the noise that are given or, for None, drawn."""
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
            synchronize()
        return losses

    def _draw(self) -> Draw:
        batch, _, _, size = self.images.shape
        t = torch.randint(0, self.timesteps, (batch,), device=torch_device())
        return t, draw(batch, size, self.channels_last)


def _torch_loss(
    network: Callable[[Tensor, Tensor], Tensor], schedule: ddpm.NoiseSchedule
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    signal, deviation = (
        torch.from_numpy(table.astype(np.float32)).to(torch_device())
        for table in (schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod)
    )

    def loss(x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_t = _at(signal, t) * x_start + _at(deviation, t) * noise
        return F.mse_loss(noise, network(x_t, t))

    return loss


def drawn_by_jax(
    schedule: ddpm.NoiseSchedule, images: np.ndarray, channels_last: bool, steps: int
) -> list[Draw]:
    """What the first steps of `jax_training` draw, for torch. Key and step alone decide it."""
    state = ddpm.init_train_state(jax.random.key(0), {}, optax.identity())
    drawn = []
    for number in range(steps):
        state = state._replace(step=jnp.asarray(number, jnp.int32))
        t, noise = draw_step(state, schedule, jnp.asarray(images))
        t = torch.from_numpy(np.array(t)).to(torch_device())
        drawn.append((t, nchw(noise, channels_last)))
    return drawn


def synchronize() -> None:
    """Wait for torch."""
    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def draw(batch: int, size: int, channels_last: bool) -> Tensor:
    """Standard normal noise, [batch, 3, size, size], in the layout asked for."""
    if channels_last:
        # Filled in memory order: drawing into a channels_last tensor is slow in torch.
        return torch.randn(batch, size, size, 3, device=torch_device()).permute(0, 3, 1, 2)
    return torch.randn(batch, 3, size, size, device=torch_device())


def nchw(images: Any, channels_last: bool = False) -> Tensor:
    """JAX's images for torch."""
    tensor = torch.from_numpy(np.array(images)).to(torch_device()).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=memory_format(channels_last))


def nhwc(images: Tensor) -> np.ndarray:
    """torch's images for JAX."""
    return images.detach().cpu().permute(0, 2, 3, 1).numpy()


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table[t][:, None, None, None]
