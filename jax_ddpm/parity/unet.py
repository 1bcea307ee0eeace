"""Cases for the U-Net: diffusers' own `UNet2DModel`, in the shapes that its config can take."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

import jax_ddpm as ddpm
from jax_ddpm.interop import unet_from_torch, unet_to_torch
from jax_ddpm.parity.harness import Case, DType, from_torch, images, timesteps, to_torch

__all__ = ["CIFAR10", "CONFIGS", "UNET_CASES", "labels", "reference_unet", "twin"]

_TIMESTEPS = 1000
_SMALL: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "layers_per_block": 1,
}
_LABELS: dict[str, Any] = {**_SMALL, "num_class_embeds": 5}
_ONE_LEVEL: dict[str, Any] = {
    **_LABELS,
    "block_out_channels": (16,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}
_LEARNED: dict[str, Any] = {
    **_SMALL,
    "out_channels": 6,
    "resnet_time_scale_shift": "scale_shift",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "diffusers' defaults": _SMALL,
    "Ho et al.'s": {
        **_SMALL,
        "attention_head_dim": None,
        "downsample_padding": 0,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "norm_eps": 1e-6,
        "layers_per_block": 2,
    },
    "learned variance, scale and shift": _LEARNED,
    "labels, three layers": {**_LABELS, "layers_per_block": 3},
    "odd channels, groups and heads": {
        **_SMALL,
        "block_out_channels": (15, 45),
        "norm_num_groups": 5,
        "attention_head_dim": 7,
        "act_fn": "gelu",
        "mid_block_scale_factor": 1.4,
        "center_input_sample": True,
    },
    "attention at every level": {
        **_SMALL,
        "block_out_channels": (8, 8, 24),
        "down_block_types": ("AttnDownBlock2D",) * 3,
        "up_block_types": ("AttnUpBlock2D",) * 3,
        "act_fn": "mish",
        "time_embedding_dim": 24,
        "attn_norm_num_groups": 4,
        "resnet_time_scale_shift": "scale_shift",
    },
    "no attention, no middle": {
        **_SMALL,
        "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2,
        "mid_block_type": None,
        "act_fn": "relu",
    },
    "no attention in the middle": {**_SMALL, "add_attention": False},
}
CIFAR10: dict[str, Any] = {
    **CONFIGS["Ho et al.'s"],
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 32,
}


class _Float64Timesteps(torch.nn.Module):
    """diffusers computes the sinusoids in float32 whatever the model's dtype, which alone puts a
    float64 output 1e-8 off. Here they are, in float64."""

    def __init__(self, features: int, flip_sin_to_cos: bool, freq_shift: int) -> None:
        super().__init__()
        self.features, self.flip, self.shift = features, flip_sin_to_cos, freq_shift

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        half = self.features // 2
        exponents = torch.arange(half, dtype=torch.float64) / (half - self.shift)
        angles = torch.outer(t.double(), 1e-4**exponents)
        waves = [angles.sin(), angles.cos()]
        padding = angles.new_zeros(len(t), self.features % 2)
        return torch.cat([*(reversed(waves) if self.flip else waves), padding], dim=1)


def reference_unet(config: dict[str, Any], dtype: DType) -> UNet2DModel:
    """A randomly initialised `UNet2DModel`; the same numbers at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = UNet2DModel(**config)
    if dtype == "float64":
        said = network.config
        network.time_proj = _Float64Timesteps(
            said.block_out_channels[0], said.flip_sin_to_cos, said.freq_shift
        )
    for parameter in network.parameters():  # `.to` warns of a list that is empty
        parameter.data = parameter.data.to(getattr(torch, dtype))
    return network.eval()


def twin(network: UNet2DModel) -> tuple[ddpm.UNet, dict[str, Any]]:
    """The same network here: its model and its variables."""
    said = {name: tuple(v) if isinstance(v, list) else v for name, v in network.config.items()}
    fields: dict[str, Any] = {
        name: said[name] for name in ddpm.UNet.__dataclass_fields__ if name in said
    }
    model = ddpm.UNet(**fields, precision="highest")
    return model, unet_from_torch(network.state_dict(), model)


def labels(config: dict[str, Any], batch: int) -> np.ndarray | None:
    """One label an image, all different, where the network has labels."""
    classes = config.get("num_class_embeds")
    return None if classes is None else np.arange(batch, dtype=np.int32) % classes


def _output(model: ddpm.UNet, variables: Any, x: Any, t: Any, y: Any) -> Any:
    return model.apply(variables, x, t, y)


def _torch_output(network: UNet2DModel, x: Any, t: Any, y: np.ndarray | None) -> torch.Tensor:
    class_labels = None if y is None else to_torch(y).long()
    return network(to_torch(x), to_torch(t).long(), class_labels=class_labels).sample


def _forward_case(name: str, config: dict[str, Any], shape: tuple[int, ...]) -> Case:
    def compare(dtype: DType):
        network = reference_unet(config, dtype)
        model, variables = twin(network)
        x, t, y = images(0, dtype, shape), timesteps(_TIMESTEPS, shape[0]), labels(config, shape[0])
        with torch.no_grad():
            expected = from_torch(_torch_output(network, x, t, y))
        return jax.jit(model.apply)(variables, x, t, y), expected

    return Case("unet", f"UNet, {name}: output", compare)


def _round_trip_case(name: str, config: dict[str, Any]) -> Case:
    def compare(dtype: DType):
        network = reference_unet(config, dtype)
        _, variables = twin(network)
        theirs = {name: value.numpy() for name, value in network.state_dict().items()}
        return unet_to_torch(jax.tree.map(jnp.asarray, variables)), theirs

    return Case("weights", f"UNet, {name}: torch → Flax → torch", compare)


def _gradient_case(name: str, config: dict[str, Any], shape: tuple[int, ...]) -> Case:
    def compare(dtype: DType):
        network = reference_unet(config, dtype)
        model, variables = twin(network)
        x, t, y = images(0, dtype, shape), timesteps(_TIMESTEPS, shape[0]), labels(config, shape[0])

        def loss_fn(variables):
            return jnp.mean(jnp.square(_output(model, variables, x, t, y)))

        _torch_output(network, x, t, y).square().mean().backward()
        grads = ((name, value.grad) for name, value in network.named_parameters())
        expected = {name: grad.numpy() for name, grad in grads if grad is not None}
        ours = unet_to_torch(jax.jit(jax.grad(loss_fn))(variables))
        # As one vector: a bias before a softmax has no gradient but rounding, and no scale.
        return _vector(ours, expected), _vector(expected, expected)

    return Case("unet gradients", f"UNet, {name}: gradient of every parameter", compare)


def _training_case(name: str, config: dict[str, Any], shape: tuple[int, ...], steps: int) -> Case:
    """AdamW on the ε loss, from the same draws."""

    def compare(dtype: DType):
        network = reference_unet(config, dtype)
        model, variables = twin(network)
        schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(_TIMESTEPS))
        # ε of 1e-5: by default Adam makes a whole step of a gradient that is only rounding.
        torch_optimizer = torch.optim.AdamW(
            network.parameters(), lr=1e-4, eps=1e-5, weight_decay=0.01
        )
        optimizer = optax.adamw(1e-4, eps=1e-5, weight_decay=0.01)
        x_start, y = images(0, dtype, shape), labels(config, shape[0])
        t = timesteps(_TIMESTEPS, shape[0])

        @jax.jit
        def step(variables, opt_state, noise):
            def loss_fn(variables):
                def denoise_fn(x, t):
                    return _output(model, variables, x, t, y)

                return jnp.mean(ddpm.training_losses(schedule, denoise_fn, x_start, t, noise))

            loss, grads = jax.value_and_grad(loss_fn)(variables)
            updates, opt_state = optimizer.update(grads, opt_state, variables)
            return optax.apply_updates(variables, updates), opt_state, loss

        alpha_bar = _alphas_cumprod()[to_torch(t).long()].reshape(-1, 1, 1, 1)
        signal, deviation = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        opt_state, losses, expected_losses = optimizer.init(variables), [], []
        for number in range(steps):
            noise = images(1 + number, dtype, shape)
            variables, opt_state, loss = step(variables, opt_state, noise)
            losses.append(loss)
            x_t = from_torch(signal * to_torch(x_start) + deviation * to_torch(noise))
            output = _torch_output(network, x_t.astype(dtype), t, y)
            expected_loss = torch.nn.functional.mse_loss(output, to_torch(noise))
            torch_optimizer.zero_grad()
            expected_loss.backward()
            torch_optimizer.step()
            expected_losses.append(expected_loss.item())
        expected = {name: value.numpy() for name, value in network.state_dict().items()}
        return (
            (unet_to_torch(variables), np.stack(losses)),
            (expected, np.asarray(expected_losses)),
        )

    return Case("training", f"UNet, {name}: {steps} AdamW steps: weights, losses", compare)


def _ddim_case(name: str, config: dict[str, Any], shape: tuple[int, ...], steps: int) -> Case:
    """diffusers' network under diffusers' scheduler, its tables replaced by float64 ones."""

    def compare(dtype: DType):
        network = reference_unet(config, dtype)
        model, variables = twin(network)
        schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(_TIMESTEPS))
        chain = ddpm.respace(schedule, ddpm.spaced_timesteps(_TIMESTEPS, steps))
        x_T = images(0, dtype, shape)

        @jax.jit
        def loop(variables, x_T):
            def denoise_fn(x, t):
                return model.apply(variables, x, t)

            return ddpm.p_sample_loop(None, chain, denoise_fn, shape, sampler=ddpm.ddim(), x_T=x_T)

        scheduler: Any = DDIMScheduler(_TIMESTEPS, 1e-4, 0.02, clip_sample=True)
        scheduler.alphas_cumprod = _alphas_cumprod()
        scheduler.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
        scheduler.set_timesteps(steps)
        x = to_torch(x_T)
        with torch.no_grad():
            for t in scheduler.timesteps:
                output = network(x, t).sample
                x = scheduler.step(output, t, x, use_clipped_model_output=True).prev_sample
        return loop(variables, x_T), from_torch(x)

    return Case("unet chain", f"UNet, {name}: {steps} steps of DDIM", compare)


def _alphas_cumprod() -> torch.Tensor:
    betas = torch.linspace(1e-4, 0.02, _TIMESTEPS, dtype=torch.float64)
    return torch.cumprod(1 - betas, dim=0)


def _vector(tensors: dict[str, np.ndarray], order: dict[str, Any]) -> np.ndarray:
    return np.concatenate([tensors[name].ravel() for name in order])


UNET_CASES = (
    *(_forward_case(name, config, (3, 8, 12, 3)) for name, config in CONFIGS.items()),
    *(
        _round_trip_case(name, CONFIGS[name])
        for name in ("diffusers' defaults", "odd channels, groups and heads")
    ),
    _gradient_case("learned variance, scale and shift", _LEARNED, (2, 8, 8, 3)),
    _gradient_case("labels", _LABELS, (2, 8, 8, 3)),
    _training_case("labels, one level", _ONE_LEVEL, (2, 8, 8, 3), 10),
    _forward_case("35.7 M parameters", CIFAR10, (1, 32, 32, 3)),
    _ddim_case("35.7 M parameters", CIFAR10, (1, 32, 32, 3), 50),
)
