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
from jax_ddpm.parity.compare import Pair
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
from jax_ddpm.training import draw_step
from torch_reference.forward import q_sample
from torch_reference.models.openai import Classifier, UNet
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


def _config(
    channels: tuple[int, ...] = (16, 32),
    down: tuple[str, ...] = ("Down", "AttnDown"),
    up: tuple[str, ...] = ("AttnUp", "Up"),
    **fields: Any,
) -> dict[str, Any]:
    """The keywords of a `UNet2DModel`, by default a small one."""
    down, up = (tuple(f"{kind}Block2D" for kind in kinds) for kinds in (down, up))
    blocks = {"block_out_channels": channels, "down_block_types": down, "up_block_types": up}
    return {**blocks, "norm_num_groups": 8, "layers_per_block": 1, **fields}


_LABELS: dict[str, Any] = {"num_class_embeds": 5}
_SCALE_SHIFT: dict[str, Any] = {"resnet_time_scale_shift": "scale_shift"}
_LEARNED = _config(out_channels=6, **_SCALE_SHIFT)
_RESNET: dict[str, Any] = {"downsample_type": "resnet", "upsample_type": "resnet"}
_HO: dict[str, Any] = {"attention_head_dim": None, "downsample_padding": 0, "layers_per_block": 2}
_HO |= {"flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
_ODD: dict[str, Any] = {"attention_head_dim": 7, "act_fn": "gelu", "norm_num_groups": 5}
_ODD |= {"mid_block_scale_factor": 1.4, "center_input_sample": True}
_EVERY_LEVEL: Any = {"act_fn": "mish", "time_embedding_dim": 24, "attn_norm_num_groups": 4}
_DHARIWAL = {"out_channels": 6, "attention_head_dim": 8, "attn_norm_num_groups": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": _config(),
    "Ho et al.'s": _config(**_HO),
    "learned variance, scale and shift": _LEARNED,
    "labels, three layers": _config(layers_per_block=3, **_LABELS),
    "odd channels, groups and heads": _config((15, 45), **_ODD),
    "attention at every level": _config(
        (8, 8, 24), ("AttnDown",) * 3, ("AttnUp",) * 3, **_EVERY_LEVEL, **_SCALE_SHIFT
    ),
    "no attention, no middle": _config(
        down=("Down", "Down"), up=("Up", "Up"), mid_block_type=None, act_fn="relu"
    ),
    "no attention in the middle": _config(add_attention=False),
    "heads wider than the first level": _config(attention_head_dim=32),
    "Dhariwal & Nichol's": _config(
        (16, 24, 32),
        ("ResnetDownsample", "AttnDown", "AttnDown"),
        ("AttnUp", "AttnUp", "ResnetUpsample"),
        **{**_DHARIWAL, **_SCALE_SHIFT, **_RESNET, **_LABELS},
    ),
    # `upsample_type` has no say in blocks without attention.
    "residual and other resampling": _config(
        (8, 16, 24), ("AttnDown", "Down", "AttnDown"), ("ResnetUpsample", "Up", "AttnUp"), **_RESNET
    ),
}
CIFAR10 = _config(
    (128, 256, 256, 256),
    ("Down", "AttnDown", "Down", "Down"),
    ("Up", "Up", "AttnUp", "Up"),
    **{**_HO, "sample_size": 32, "norm_num_groups": 32},
)


class _Float64Timesteps(torch.nn.Module):
    """diffusers computes the sinusoids in float32 whatever the model's dtype, which alone puts a
    float64 output 1e-8 off. Here they are, in float64."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half, odd = divmod(self.config.block_out_channels[0], 2)
        exponents = torch.arange(half, dtype=torch.float64) / (half - self.config.freq_shift)
        angles = torch.outer(t.double(), 1e-4**exponents)
        waves = [angles.sin(), angles.cos()]
        ordered = reversed(waves) if self.config.flip_sin_to_cos else waves
        return torch.cat([*ordered, angles.new_zeros(len(t), odd)], dim=1)


def reference_unet(config: dict[str, Any], dtype: DType) -> Any:
    """A randomly initialised `UNet2DModel`; the same numbers at every call."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    network = _seeded(0, partial(UNet2DModel, **config))
    if dtype == "float64":
        network.time_proj = _Float64Timesteps(network.config)
    torch.nn.Module.to(network, getattr(torch, dtype))  # diffusers' own `to` logs a warning
    return network.eval()


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


def _openai(
    dtype: DType,
    reference: Callable[[], Any],
    flags: dict[str, Any],
    shape: tuple[int, ...] = (2, 16, 16, 3),
) -> Pair:
    """One network twice: as the reference is called, and by the flags of OpenAI's code."""
    module = _seeded(0, reference)
    load = interop.load_openai_classifier if "classifier_pool" in flags else interop.load_openai
    model: Any = load(module.state_dict(), flags)[0]
    classes = 1000 if flags.get("class_cond") else None
    inputs = _inputs(dtype, shape, flags.get("diffusion_steps", _TIMESTEPS), classes)
    apply = model.clone(precision="highest").apply
    return Pair(module, apply, lambda tensors: load(tensors, flags)[1], inputs, dtype)


def _classifier(pool: str, plain: bool = False) -> tuple[Any, ...]:
    """`_openai` and its arguments; `plain`: no scale and shift, no resampling residual blocks."""
    flags = {"image_size": 64, "classifier_width": 64, "classifier_depth": 1}
    reference = partial(Classifier, 64, 64, (1, 2, 3, 4), 1, (2, 4, 8), pool=pool)
    if plain:
        flags |= {"classifier_use_scale_shift_norm": False, "classifier_resblock_updown": False}
        reference = partial(reference, scale_shift=False, updown=False)
    return _openai, reference, {**flags, "classifier_pool": pool}, (2, 64, 64, 3)


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
# The way up has its own number of heads; t is rescaled to 1,000 steps.
_IMPROVED = partial(
    UNet, 32, (1, 2), 1, (1, 2), heads=2, heads_up=4, scale_shift=False, time_scale=0.25
)
_IMPROVED_FLAGS = {
    **{"image_size": 16, "num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,2"},
    **{"num_heads": 2, "num_heads_upsample": 4, "attention_resolutions": "16,8"},
    **{"use_scale_shift_norm": False, "diffusion_steps": 4000, "rescale_timesteps": True},
}
_GUIDED = partial(UNet, heads=None, updown=True)
_GUIDED_64 = partial(
    _GUIDED, 32, (1, 2), 2, (2,), head_channels=16, new_order=True, classes=1000, out_channels=6
)
_GUIDED_64_FLAGS = {
    **{"image_size": 16, "num_channels": 32, "num_res_blocks": 2, "channel_mult": "1,2"},
    **{"num_head_channels": 16, "attention_resolutions": "8", "resblock_updown": True},
    **{"use_new_attention_order": True, "class_cond": True, "learn_sigma": True},
}
# The first level has half as many channels as there are sinusoids.
_GUIDED_512 = partial(_GUIDED, 64, (0.5, 1, 1, 2, 2, 4, 4), 1, (32, 64), head_channels=32)
_GUIDED_512_FLAGS = {
    **{"image_size": 512, "num_channels": 64, "num_res_blocks": 1, "channel_mult": ""},
    **{"num_head_channels": 32, "attention_resolutions": "16,8", "resblock_updown": True},
}
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
            ("UNet, learned variance, scale and shift", _LEARNED),
            ("UNet, labels", _config(**_LABELS)),
        )
    ),
    _case(
        "training",
        f"UNet, labels, one level: {_ADAM_STEPS} AdamW steps: weights, losses",
        _unet_training,
        _unet,
        _config((16,), ("Down",), ("Up",), **_LABELS),
    ),
    _case("unet", "UNet, 35.7 M parameters: output", Pair.outputs, *_LARGE),
    _case("unet chain", f"UNet, 35.7 M parameters: {_DDIM_STEPS} steps of DDIM", _ddim, *_LARGE),
    *(
        _case("openai", f"{name}: output", Pair.outputs, _openai, *network)
        for name, *network in (
            ("improved-diffusion's", _IMPROVED, _IMPROVED_FLAGS),
            ("guided-diffusion's, 64×64", _GUIDED_64, _GUIDED_64_FLAGS),
            ("guided-diffusion's, 512×512", _GUIDED_512, _GUIDED_512_FLAGS, (1, 64, 64, 3)),
        )
    ),
    _case(
        "openai",
        "classifier, attention: logits, ∇ log p(y | x_t)",
        _score,
        *_classifier("attention"),
    ),
    *(
        _case("openai", f"classifier, {pool}: logits", Pair.outputs, *_classifier(pool, plain))
        for pool, plain in (("adaptive", True), ("spatial", False), ("spatial_v2", False))
    ),
)
