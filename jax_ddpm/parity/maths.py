"""Cases for the schedule, the forward process and one reverse step.

The reference computes in float64 also where the library computes in float32, on the same
rounded inputs: the error is then the library's own.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_ddpm as ddpm
from jax_ddpm.parity.harness import Case, DType, both, from_torch, images, timesteps, to_torch
from torch_reference.schedule import T, tables

__all__ = ["MATHS_CASES", "float64", "network", "schedule", "torch_network"]


def _schedule_case(name: str, timesteps: int) -> Case:
    def compare(dtype: DType):
        ours, theirs = both(name)
        if name == "linear_beta_schedule":
            return ours(timesteps).astype(dtype), theirs(timesteps, torch.float64).numpy()
        return ours(timesteps).astype(dtype), theirs(timesteps).numpy()

    return Case("maths", f"{name}({timesteps})", compare)


def _tables_case(name: str) -> Case:
    def compare(dtype: DType):
        x = np.zeros((T, 1), dtype)
        ours = ddpm.extract(getattr(schedule(), name), np.arange(T), x)[:, 0]
        return ours, getattr(tables(torch.float64), name).numpy()

    return Case("maths", f"make_schedule: {name}", compare)


def _function_case(name: str, arguments: int) -> Case:
    """A function of (schedule, image, t, image) or of (schedule, image, image, t)."""

    def compare(dtype: DType):
        ours, theirs = both(name)
        t, drawn = timesteps(T), [images(seed, dtype) for seed in range(arguments)]
        if name == "q_posterior_mean_variance":
            order = [*drawn, t]
        else:
            order = [drawn[0], t, *drawn[1:]]
        result = jax.jit(lambda *args: ours(schedule(), *args))(*order)
        expected = theirs(tables(torch.float64), *map(float64, order))
        if isinstance(expected, tuple):
            return tuple(result), tuple(map(from_torch, expected))
        return result, from_torch(expected)

    return Case("maths", name, compare)


def _p_mean_variance_case(prediction_type: str, variance_type: str, clip: bool) -> Case:
    policy: dict[str, Any] = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_denoised": clip,
    }

    def compare(dtype: DType):
        ours, theirs = both("p_mean_variance")
        learned = variance_type.startswith("learned")
        x_t, t = images(0, dtype), timesteps(T)
        result = jax.jit(lambda *args: ours(schedule(), network(learned), *args, **policy))(x_t, t)
        expected = theirs(
            tables(torch.float64), torch_network(learned), float64(x_t), float64(t), **policy
        )
        return tuple(result), tuple(map(from_torch, expected))

    label = f"p_mean_variance: {prediction_type}, {variance_type}" + (", clipped" if clip else "")
    return Case("maths", label, compare)


def schedule() -> ddpm.NoiseSchedule:
    return ddpm.make_schedule(ddpm.linear_beta_schedule(T))


def network(learned: bool = False):
    """Any function of x and t will do, as long as both sides have it."""

    def denoise_fn(x, t):
        time = t.astype(x.dtype).reshape(-1, 1, 1, 1) / T
        output = jnp.tanh(x) * jnp.cos(time)
        return jnp.concatenate([output, jnp.sin(x)], axis=-1) if learned else output

    return denoise_fn


def torch_network(learned: bool = False):
    def model(x, t):
        output = torch.tanh(x) * torch.cos(t.to(x.dtype).reshape(-1, 1, 1, 1) / T)
        return torch.cat([output, torch.sin(x)], dim=1) if learned else output

    return model


def float64(array: np.ndarray) -> torch.Tensor:
    tensor = to_torch(array)
    return tensor.double() if tensor.is_floating_point() else tensor.long()


MATHS_CASES = (
    *(
        _schedule_case(name, timesteps)
        for name in (
            "linear_beta_schedule",
            "scaled_linear_beta_schedule",
            "cosine_beta_schedule",
            "sigmoid_beta_schedule",
        )
        for timesteps in (200, 1000)
    ),
    *(
        _tables_case(name)
        for name in (
            "alphas_cumprod",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "posterior_variance",
        )
    ),
    _function_case("q_sample", 2),
    _function_case("q_mean_variance", 1),
    _function_case("q_posterior_mean_variance", 2),
    _function_case("predict_xstart_from_eps", 2),
    _function_case("predict_eps_from_xstart", 2),
    _function_case("predict_v", 2),
    _function_case("predict_xstart_from_v", 2),
    _function_case("predict_eps_from_v", 2),
    *(_p_mean_variance_case(name, "fixed_small", True) for name in ("epsilon", "sample")),
    *(_p_mean_variance_case("v_prediction", "fixed_small", clip) for clip in (True, False)),
    *(
        _p_mean_variance_case("epsilon", name, False)
        for name in ("fixed_small", "fixed_large", "learned", "learned_range")
    ),
)
