"""What is compared: networks on both sides with the same weights, their loops and training steps.

torch's training step is the one that its users write, with its own fused functions.
"""

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

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
from benchmarks.harness import Contender, timed
from jax_ddpm.interop import simple_unet_from_torch, unet_from_torch
from jax_ddpm.interop.diffusers import unet_config
from jax_ddpm.plan.hlo import count_flops
from jax_ddpm.training import draw_step
from jax_ddpm.training.sharding import data_sharding, device_mesh
from torch_reference.models.simple_unet import SimpleUNet

# The library's advice about schedules: the chains here are short on purpose.
warnings.filterwarnings("ignore", "schedule: .*the chain starts")

JAX_SHARDED = "JAX jit, sharded over cores"
COMPARED_STEPS = 3
"""Of a training: their losses are compared."""

Sharding = NamedSharding | None
Wrap = Callable[[Callable], Callable]
NoiseFn = Callable[[int], Tensor]
"""The noise of an entry of the chain; the start is at its length."""

_LAYOUTS = (torch.contiguous_format, torch.channels_last)

_average = get_ema_multi_avg_fn(0.9999)
"""`(average, parameters, number)`, in place."""


class Network(NamedTuple):
    """One network on both sides."""

    name: str
    image_shape: tuple[int, int, int]
    timesteps: int
    model: Any
    """Flax's, in float32 at "highest"."""
    new_module: Callable[[], torch.nn.Module]
    """torch's."""
    from_torch: Callable[[dict[str, Tensor]], Any]
    """torch's weights for Flax."""
    learning_rate: float

    def variables(self) -> Any:
        """Flax's weights, those of torch's module."""
        return self.from_torch(self._seeded().state_dict())

    def torch_module(self, channels_last: bool) -> Any:
        """torch's, with the same weights at every call, on its device and in a layout."""
        module: Any = self._seeded().to(torch_device())
        return module.to(memory_format=_LAYOUTS[channels_last])

    def _seeded(self) -> torch.nn.Module:
        torch.manual_seed(42)
        return self.new_module()


def unet(name: str, image_shape: tuple[int, int, int], model: ddpm.UNet) -> Network:
    """`model` beside diffusers' network of the same configuration."""

    def new_module() -> Any:
        # Imported here, so that the tutorial's network needs no diffusers.
        from diffusers.models.unets.unet_2d import UNet2DModel

        return UNet2DModel(**unet_config(model))

    # Adam divides rounding by itself, and every step magnifies it: at 1e-3 the losses of eager and
    # compiled torch are 1.1e-2 apart after two steps, at 1e-5 3e-4, where a step changes them by
    # 8e-3.
    from_torch = partial(unet_from_torch, model=model)
    return Network(name, image_shape, 1000, model, new_module, from_torch, learning_rate=1e-5)


_SIMPLE = ddpm.SimpleUNet(precision="highest")
TUTORIAL = Network("tutorial", (64, 64, 3), 200, _SIMPLE, SimpleUNet, simple_unet_from_torch, 1e-3)
CIFAR10 = unet("ddpm_cifar10", (32, 32, 3), ddpm.ddpm_cifar10(precision="highest"))


def jax_contenders(batch: int) -> dict[str, Sharding]:
    """Plain and, where the batch splits over CPU devices, sharded."""
    sharding = over_cores(batch) if jax.default_backend() == "cpu" else None
    return {"JAX jit": None} | ({JAX_SHARDED: sharding} if sharding else {})


def torch_contenders(*, large: bool = False) -> dict[str, tuple[bool, Wrap]]:
    """Each torch contender: whether it is channels_last, and what wraps its functions.

    A `large` network is compiled in one layout only, since that takes a minute.
    """
    # One program for each batch size: torch would turn to symbolic shapes at the second, and
    # past its limit of recompilations to eager, without a word.
    torch.compiler.reset()
    compiled = partial(torch.compile, dynamic=False)
    contenders: dict[str, tuple[bool, Wrap]] = {
        "torch eager": (False, lambda function: function),
        "torch eager, channels_last": (True, lambda function: function),
        "torch.compile": (False, compiled),
        "torch.compile, channels_last": (True, compiled),
    }
    if large:
        del contenders["torch.compile"]
    return contenders


def over_cores(batch: int, devices: int | None = None) -> Sharding:
    """The batch over as many of the devices as divide it, if that is more than one."""
    mesh = device_mesh(batch, devices=jax.devices()[:devices])
    return data_sharding(mesh) if mesh.size > 1 else None


def jax_loop(
    network: Network, steps: int, batch: int, sharding: Sharding = None, *, clip: bool = False
) -> Contender:
    """JAX's reverse loop, from `key(0)`."""
    schedule, shape = _chain(network, steps), (batch, *network.image_shape)

    @jax.jit
    def loop(key, variables):
        denoise_fn = partial(network.model.apply, variables)
        policy = {"clip_denoised": clip, "sharding": sharding}
        return ddpm.p_sample_loop(key, schedule, denoise_fn, shape, **policy)

    arguments = jax.device_put((jax.random.key(0), network.variables()), _whole(sharding))
    program, facts = _compiled(loop, arguments)

    def run() -> Any:
        return jax.block_until_ready(program(*arguments))

    return Contender(run, lambda: np.asarray(run()), **facts)


def torch_loop(
    network: Network, steps: int, batch: int, channels_last: bool, wrap: Wrap
) -> Contender:
    """The tutorial's loop, in a form that torch.compile takes whole.

    It never looks at the value of t (the last step's variance is zero), and gathers on the device.
    """
    schedule, module = _chain(network, steps), network.torch_module(channels_last)
    scale = _tensor(1 / np.sqrt(1 - schedule.betas))
    weight = _tensor(schedule.betas / schedule.sqrt_one_minus_alphas_cumprod)
    deviation = _tensor(np.sqrt(schedule.posterior_variance))

    @wrap
    def step(x: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        mean = _at(scale, t) * (x - _at(weight, t) * _image(module(x, t)))
        return mean + _at(deviation, t) * noise

    @torch.no_grad()
    def loop(noise_fn: NoiseFn) -> Tensor:
        x = noise_fn(steps)
        for entry in reversed(range(steps)):
            t = torch.full((batch,), entry, device=x.device)
            x = step(x, t, noise_fn(entry))
        synchronize()
        return x

    return loop_contender(loop, network, batch, channels_last)


def loop_contender(
    loop: Callable[[NoiseFn], Tensor], network: Network, batch: int, channels_last: bool
) -> Contender:
    """A loop of torch's: compared on the noise of JAX's loop, timed with its own."""
    shape = (batch, *network.image_shape)

    def given(entry: int) -> Tensor:
        return _nchw(ddpm.sample_noise(jax.random.key(0), entry, shape), channels_last)

    def compared() -> np.ndarray:
        return loop(given).cpu().permute(0, 2, 3, 1).numpy()

    return Contender(lambda: loop(lambda _: _draw(shape, channels_last)), compared)


def jax_training(network: Network, steps: int, batch: int, sharding: Sharding = None) -> Contender:
    """`steps` training steps (Adam) in one scan, whose state is donated."""
    optimizer = optax.adam(network.learning_rate)
    schedule = _chain(network, network.timesteps)
    step = ddpm.make_train_step(schedule, network.model.apply, optimizer)
    state = ddpm.init_train_state(jax.random.key(0), network.variables(), optimizer)
    # A copy, since it is donated.
    state = jax.device_put(jax.tree.map(jnp.copy, state), _whole(sharding))
    images = jax.device_put(_images(network, batch), sharding or _whole(None))

    @partial(jax.jit, donate_argnums=0)
    def train(state, images):
        return lax.scan(lambda state, _: step(state, images), state, length=steps)

    program, facts = _compiled(train, (state, images))

    def run() -> np.ndarray:
        nonlocal state
        state, metrics = jax.block_until_ready(program(state, images))
        return np.asarray(metrics["loss"])

    return Contender(run, lambda: run()[:COMPARED_STEPS], **facts)


def torch_training(
    network: Network, steps: int, batch: int, channels_last: bool, wrap: Wrap
) -> Contender:
    """Loss, gradient and its norm, Adam's step, the average of the weights; `wrap`s the loss."""
    schedule, shape = _chain(network, network.timesteps), (batch, *network.image_shape)
    signal = _tensor(schedule.sqrt_alphas_cumprod)
    deviation = _tensor(schedule.sqrt_one_minus_alphas_cumprod)
    module, images = network.torch_module(channels_last), _images(network, batch)
    parameters = list(module.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.Adam(parameters, lr=network.learning_rate, fused=True)

    @wrap
    def loss_of(x_start: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        x_t = _at(signal, t) * x_start + _at(deviation, t) * noise
        return F.mse_loss(noise, _image(module(x_t, t)))

    def train(draws: Iterable[tuple[Tensor, Tensor]]) -> np.ndarray:
        losses = []
        for t, noise in draws:
            loss = loss_of(x_start, t, noise)
            optimizer.zero_grad()
            loss.backward()
            get_total_norm([each.grad for each in parameters if each.grad is not None])
            optimizer.step()
            _average(average, parameters, 0)
            losses.append(loss.item())
        synchronize()
        return np.array(losses)

    def own() -> Iterable[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            t = torch.randint(0, network.timesteps, (batch,), device=torch_device())
            yield t, _draw(shape, channels_last)

    def given() -> Iterable[tuple[Tensor, Tensor]]:
        """What JAX's training draws. Key and step alone decide it."""
        state = ddpm.init_train_state(jax.random.key(0), {}, optax.identity())
        for number in range(COMPARED_STEPS):
            state = state._replace(step=jnp.asarray(number, jnp.int32))
            t, noise = draw_step(state, schedule, jnp.asarray(images))
            yield torch.from_numpy(np.array(t)).to(torch_device()), _nchw(noise, channels_last)

    x_start = _nchw(images, channels_last)
    return Contender(lambda: train(own()), lambda: train(given()))


def torch_device() -> torch.device:
    """Where torch computes: beside JAX, if it can."""
    cuda = jax.default_backend() == "gpu" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")


def synchronize() -> None:
    """Wait for torch."""
    if torch_device().type == "cuda":
        torch.cuda.synchronize()


def _compiled(function: Any, arguments: tuple[Any, ...]) -> tuple[Any, dict[str, Any]]:
    """The program, and what a `Contender` says of it."""
    traced = function.trace(*arguments)
    program, seconds = timed(lambda: traced.lower().compile())
    return program, {"compile_s": seconds, "program": program, "flops": count_flops(traced.jaxpr)}


def _chain(network: Network, steps: int) -> ddpm.NoiseSchedule:
    """The last few steps of a network's chain: each costs the same."""
    whole = ddpm.make_schedule(ddpm.linear_beta_schedule(network.timesteps))
    return ddpm.respace(whole, range(steps))


def _images(network: Network, batch: int) -> np.ndarray:
    """What both sides train on."""
    return np.asarray(jax.random.normal(jax.random.key(1), (batch, *network.image_shape)))


def _whole(sharding: Sharding) -> Any:
    """Where weights live beside a batch under `sharding`."""
    return jax.devices()[0] if sharding is None else NamedSharding(sharding.mesh, PartitionSpec())


def _image(output: Any) -> Tensor:
    """The image in what a module returns, diffusers' or the tutorial's."""
    return output if isinstance(output, Tensor) else output.sample


def _nchw(images: Any, channels_last: bool) -> Tensor:
    tensor = torch.from_numpy(np.array(images)).to(torch_device()).permute(0, 3, 1, 2)
    return tensor.contiguous(memory_format=_LAYOUTS[channels_last])


def _draw(shape: tuple[int, ...], channels_last: bool) -> Tensor:
    """Standard normal noise of a shape NHWC, for torch, in the layout asked for."""
    # Filled in memory order: drawing into a channels_last tensor is slow in torch.
    if channels_last:
        return torch.randn(shape, device=torch_device()).permute(0, 3, 1, 2)
    return torch.randn(shape[0], shape[3], *shape[1:3], device=torch_device())


def _tensor(table: Any) -> Tensor:
    return torch.from_numpy(np.asarray(table, np.float32)).to(torch_device())


def _at(table: Tensor, t: Tensor) -> Tensor:
    return table[t][:, None, None, None]
