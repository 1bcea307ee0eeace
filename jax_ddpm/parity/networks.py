"""Cases of whole networks: the tutorial's, diffusers' and OpenAI's.

Both sides start from the same torch weights, and compute in the dtype under test unless a
`Setting` says otherwise. diffusers is imported when a case of its networks runs. OpenAI's are
beside `torch_reference.models.openai`, which gives what their own code gave for the fixtures of
`tests/interop/openai`, to 2e-14.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jax_ddpm as ddpm
from jax_ddpm import interop
from jax_ddpm.parity.harness import (
    Case,
    DType,
    both,
    from_torch,
    images,
    schedule,
    timesteps,
    to_torch,
    vector,
)
from jax_ddpm.parity.pair import Pair
from jax_ddpm.training import draw_step
from torch_reference.forward import q_sample
from torch_reference.models import openai
from torch_reference.models.diffusers import (
    CIFAR10,
    CONFIGS,
    LABELS,
    LEARNED,
    reference_unet,
    unet_config,
)
from torch_reference.schedule import T, tables

_EMA_DECAY = 0.99
_TIMESTEPS, _ADAM_STEPS, _DDIM_STEPS = 1000, 10, 50


class Setting(NamedTuple):
    """How the tutorial's network is compared; the defaults are those of the certified table."""

    size: int = 8
    """Height and width of the images."""
    adam_steps: int = 100
    adam_eps: float = 1e-8
    """Added to √v. By default Adam makes a whole step of a gradient that is only rounding."""
    oracle: DType | None = None
    """What torch computes in; None: in the dtype under test."""
    fields: Mapping[str, Any] = {"precision": "highest"}
    """Of the JAX network: `precision`, or `dtype`."""


def _case(
    kind: str,
    name: str,
    compare: Callable[[Pair], tuple[Any, Any]],
    make_pair: Callable[..., Pair],
    *network: Any,
) -> Case:
    """What `compare` finds for `make_pair(dtype, *network)`."""
    return Case(kind, name, lambda dtype: compare(make_pair(dtype, *network)))


def _seeded(seed: int, reference: Callable[[], Any]) -> Any:
    """The reference network, randomly initialised; the same numbers at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return reference()


def _inputs(
    dtype: DType, shape: tuple[int, ...], total: int = _TIMESTEPS, classes: int | None = None
) -> list[np.ndarray]:
    """Images, steps and, where the network has classes, labels."""
    inputs = [images(0, dtype, shape), timesteps(total, shape[0])]
    return [*inputs, np.arange(shape[0], dtype=np.int32) % classes] if classes else inputs


def _tutorial(dtype: DType, setting: Setting, batch: int = 4) -> Pair:
    """The torch network at the tutorial's own initialisation, and the one in Flax."""
    ours, theirs = both("SimpleUNet")
    apply = ours(param_dtype=jnp.dtype(dtype), **setting.fields).apply
    inputs = _inputs(dtype, (batch, setting.size, setting.size, 3), T)
    convert = interop.simple_unet_from_torch
    return Pair(_seeded(42, theirs), apply, convert, inputs, dtype, oracle=setting.oracle)


def _tutorial_training(setting: Setting, pair: Pair) -> tuple[Any, Any]:
    """Adam at the tutorial's rate with an average of the weights, on the same draws."""
    reference, average = pair.module, copy.deepcopy(pair.module).requires_grad_(False)
    torch_optimizer = torch.optim.Adam(reference.parameters(), lr=1e-3, eps=setting.adam_eps)
    optimizer = optax.adam(1e-3, eps=setting.adam_eps)
    state = ddpm.init_train_state(jax.random.key(42), pair.variables, optimizer)
    train_step = ddpm.make_train_step(schedule(), pair.apply, optimizer, ema_decay=_EMA_DECAY)
    train_step = jax.jit(train_step, donate_argnums=0)
    draw = jax.jit(lambda state, batch: draw_step(state, schedule(), batch))
    x_start = pair.inputs[0]
    losses, expected_losses = [], []
    for _ in range(setting.adam_steps):
        drawn = draw(state, x_start)
        state, metrics = train_step(state, x_start)
        losses.append(metrics["loss"])

        x_0, t, noise = (to_torch(each, pair.oracle) for each in (x_start, *drawn))
        x_t = q_sample(tables(noise.dtype), x_0, t, noise)
        torch_optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(noise, reference(x_t, t))
        loss.backward()
        torch_optimizer.step()
        expected_losses.append(loss.item())
        for mean, value in zip(average.parameters(), reference.parameters(), strict=True):
            mean.lerp_(value.detach(), 1 - _EMA_DECAY)
    expected = [pair.converted(each.state_dict()) for each in (reference, average)]
    ours = [state.params, state.ema_params, np.stack(losses)]
    return ours, [*expected, np.asarray(expected_losses)]


def tutorial_cases(setting: Setting) -> tuple[Case, ...]:
    """Everything that depends on how the network computes."""
    network = _tutorial, setting
    training = f"{setting.adam_steps} Adam steps: weights, EMA, losses"
    return (
        _case("forward", "SimpleUNet: output", Pair.outputs, *network),
        _case("gradients", "SimpleUNet: gradient of every parameter", Pair.gradients, *network),
        _case("training", training, partial(_tutorial_training, setting), *network),
        _case("chain", f"reverse chain: each of {T} states", Pair.chain, *network, 2),
    )


def _unet(dtype: DType, config: dict[str, Any], shape: tuple[int, ...] = (2, 8, 8, 3)) -> Pair:
    """diffusers' network and this library's."""
    network = reference_unet(config, dtype)
    said = {name: tuple(v) if isinstance(v, list) else v for name, v in network.config.items()}
    fields: Any = {name: said[name] for name in ddpm.UNet.__dataclass_fields__ if name in said}
    model = ddpm.UNet(**fields, precision="highest")
    convert = partial(interop.unet_from_torch, model=model)
    inputs = _inputs(dtype, shape, classes=config.get("num_class_embeds"))

    def call(network, x, t, y=None):
        return network(x, t, class_labels=y).sample

    return Pair(network, model.apply, convert, inputs, dtype, torch_fn=call)


def _gradients(pair: Pair) -> tuple[Any, Any]:
    """As one vector: a bias before a softmax has no gradient but rounding, and no scale."""
    ours, theirs = pair.gradients()
    return vector(ours), vector(theirs)


def _unet_training(pair: Pair) -> tuple[Any, Any]:
    """AdamW on the ε loss, with noise of its own at each step."""
    x_start, t, *rest = pair.inputs
    draws = []
    for number in range(_ADAM_STEPS):
        noise = images(1 + number, pair.dtype, x_start.shape)
        exact = (to_torch(each, "float64") for each in (x_start, t, noise))
        x_t = from_torch(q_sample(tables(torch.float64, _TIMESTEPS), *exact))
        draws.append(((x_t.astype(pair.dtype), t, *rest), noise))
    # ε of 1e-5: by default Adam makes a whole step of a gradient that is only rounding.
    options: Any = {"eps": 1e-5, "weight_decay": 0.01}
    torch_optimizer = partial(torch.optim.AdamW, lr=1e-4, **options)
    return pair.training(optax.adamw(1e-4, **options), torch_optimizer, draws)


def _ddim(pair: Pair) -> tuple[Any, Any]:
    """diffusers' network under diffusers' scheduler, its tables replaced by float64 ones."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    chain = ddpm.respace(schedule(_TIMESTEPS), ddpm.spaced_timesteps(_TIMESTEPS, _DDIM_STEPS))
    x_T = pair.inputs[0]

    @jax.jit
    def loop(variables, x_T):
        denoise_fn = partial(pair.apply, variables)
        return ddpm.p_sample_loop(None, chain, denoise_fn, x_T.shape, sampler=ddpm.ddim(), x_T=x_T)

    scheduler: Any = DDIMScheduler(_TIMESTEPS, 1e-4, 0.02, clip_sample=True)
    scheduler.alphas_cumprod = tables(torch.float64, _TIMESTEPS).alphas_cumprod
    scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(_DDIM_STEPS)
    x = to_torch(x_T)
    with torch.no_grad():
        for t in scheduler.timesteps:
            output = pair.call(pair.module, x, t)
            x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
    return loop(pair.variables, x_T), from_torch(x)


def _openai(dtype: DType, network: openai.Network) -> Pair:
    """One network twice: as the reference is called, and by the flags of OpenAI's code."""
    module, flags = _seeded(0, network.make), network.flags
    is_classifier = network in openai.CLASSIFIERS.values()
    load = interop.load_openai_classifier if is_classifier else interop.load_openai
    apply = load(module.state_dict(), flags)[0].clone(precision="highest").apply
    inputs = _inputs(dtype, network.shape, network.timesteps, network.classes)
    return Pair(module, apply, lambda tensors: load(tensors, flags)[1], inputs, dtype)


def _score(pair: Pair) -> tuple[Any, Any]:
    """The logits, and the gradient of log p(y | x_t) by x_t, which guides."""
    x, t = pair.inputs
    labels = np.arange(len(x))

    def log_prob(x):
        logits = pair.apply(pair.variables, x, t)
        return jax.nn.log_softmax(logits)[labels, labels].sum(), logits

    score, logits = jax.jit(jax.grad(log_prob, has_aux=True))(x)
    inputs = to_torch(x).requires_grad_()
    theirs = pair.module(inputs, to_torch(t))
    theirs.log_softmax(1)[labels, labels].sum().backward()
    assert inputs.grad is not None
    expected = {"logits": from_torch(theirs), "score": from_torch(inputs.grad)}
    return {"logits": logits, "score": score}, expected


_WEIGHTS, _UNET_WEIGHTS = (
    partial(Pair.round_trip, variables_to_torch=convert)
    for convert in (interop.simple_unet_to_torch, interop.unet_to_torch)
)
_LARGE = _unet, CIFAR10, (1, 32, 32, 3)
NETWORK_CASES = (
    _case("weights", "SimpleUNet: torch → Flax → torch", _WEIGHTS, _tutorial, Setting()),
    *tutorial_cases(Setting()),
    *(
        _case("unet", f"UNet, {name}: output", Pair.outputs, _unet, config, (3, 8, 12, 3))
        for name, config in CONFIGS.items()
    ),
    *(
        _case("weights", f"UNet, {name}: torch → Flax → torch", _UNET_WEIGHTS, _unet, CONFIGS[name])
        for name in ("diffusers' defaults", "odd channels, groups and heads")
    ),
    *(
        _case("unet gradients", f"{name}: gradient of every parameter", _gradients, _unet, config)
        for name, config in (
            ("UNet, learned variance, scale and shift", LEARNED),
            ("UNet, labels", unet_config(**LABELS)),
        )
    ),
    _case(
        "training",
        f"UNet, labels, one level: {_ADAM_STEPS} AdamW steps: weights, losses",
        _unet_training,
        _unet,
        unet_config((16,), ("Down",), ("Up",), **LABELS),
    ),
    _case("unet", "UNet, 35.7 M parameters: output", Pair.outputs, *_LARGE),
    _case("unet chain", f"UNet, 35.7 M parameters: {_DDIM_STEPS} steps of DDIM", _ddim, *_LARGE),
    *(
        _case("openai", f"{name}: output", Pair.outputs, _openai, network)
        for name, network in openai.UNETS.items()
    ),
    *(
        _case(
            "openai", f"classifier, {pool}: {outputs}", compare, _openai, openai.CLASSIFIERS[pool]
        )
        for pool, outputs, compare in (
            ("attention", "logits, ∇ log p(y | x_t)", _score),
            *((pool, "logits", Pair.outputs) for pool in ("adaptive", "spatial", "spatial_v2")),
        )
    ),
)
