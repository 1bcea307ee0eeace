"""Cases for the schedule, the forward process and one reverse step.

The reference computes in float64 also where the library computes in float32, on the same
rounded inputs: the error is then the library's own.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_ddpm as ddpm
from jax_ddpm.parity.harness import (
    Case,
    DType,
    both,
    from_torch,
    images,
    schedule,
    timesteps,
    to_torch,
)
from torch_reference.schedule import T, tables


def _schedule_case(name: str, timesteps: int) -> Case:
    def compare(dtype: DType):
        ours, theirs = both(name)
        double = [torch.float64] if name == "linear_beta_schedule" else []
        return ours(timesteps).astype(dtype), theirs(timesteps, *double).numpy()

    return Case("maths", f"{name}({timesteps})", compare)


def _tables_case(name: str) -> Case:
    def compare(dtype: DType):
        x = np.zeros((T, 1), dtype)
        ours = ddpm.extract(getattr(schedule(), name), np.arange(T), x)[:, 0]
        return ours, getattr(tables(torch.float64), name).numpy()

    return Case("maths", f"make_schedule: {name}", compare)


def _function_case(name: str, *order: int) -> Case:
    """A function of the schedule and of, in their order, image 0, steps 1 and image 2."""

    def compare(dtype: DType):
        arrays = images(0, dtype), timesteps(T), images(1, dtype)
        return evaluate_function(name, *(arrays[place] for place in order))

    return Case("maths", name, compare)


def _p_mean_variance_case(prediction_type: str, variance_type: str, clip: bool) -> Case:
    policy = dict(prediction_type=prediction_type, variance_type=variance_type, clip_denoised=clip)

    def compare(dtype: DType):
        return evaluate_function("p_mean_variance", images(0, dtype), timesteps(T), **policy)

    label = f"p_mean_variance: {prediction_type}, {variance_type}" + (", clipped" if clip else "")
    return Case("maths", label, compare)


def networks(variance_type: str = "fixed_small", **_: Any) -> list[Callable[..., Any]]:
    """A network in JAX and in torch: any function of x and t, with the channels of the policy."""
    learned = variance_type.startswith("learned")

    def ours(x, t):
        output = jnp.tanh(x) * jnp.cos(t.astype(x.dtype).reshape(-1, 1, 1, 1) / T)
        return jnp.concatenate([output, jnp.sin(x)], axis=-1) if learned else output

    def theirs(x, t):
        output = torch.tanh(x) * torch.cos(t.to(x.dtype).reshape(-1, 1, 1, 1) / T)
        return torch.cat([output, torch.sin(x)], dim=1) if learned else output

    return [ours, theirs]


def evaluate_function(name: str, *arrays: np.ndarray, **policy: Any) -> tuple[Any, Any]:
    """The function of that name, of the schedule, a network if it has a policy, and arrays."""
    ours, theirs = both(name)
    model, torch_model = ([each] if policy else [] for each in networks(**policy))
    return evaluate(
        lambda *args: ours(schedule(), *model, *args, **policy),
        lambda *args: theirs(tables(torch.float64), *torch_model, *args, **policy),
        *arrays,
    )


def evaluate(ours: Callable, theirs: Callable, *arrays: Any) -> tuple[Any, Any]:
    """What both return for the same arrays: ours compiled, torch in float64."""
    result = jax.jit(ours)(*arrays)
    expected = theirs(*(to_torch(array, "float64") for array in arrays))
    if isinstance(expected, tuple):
        return tuple(result), tuple(map(from_torch, expected))
    return result, from_torch(expected)


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
    _function_case("q_sample", 0, 1, 2),
    _function_case("q_mean_variance", 0, 1),
    _function_case("q_posterior_mean_variance", 0, 2, 1),
    *(
        _function_case(name, 0, 1, 2)
        for name in (
            "predict_xstart_from_eps",
            "predict_eps_from_xstart",
            "predict_v",
            "predict_xstart_from_v",
            "predict_eps_from_v",
        )
    ),
    *(_p_mean_variance_case(name, "fixed_small", True) for name in ("epsilon", "sample")),
    *(_p_mean_variance_case("v_prediction", "fixed_small", clip) for clip in (True, False)),
    *(
        _p_mean_variance_case("epsilon", name, False)
        for name in ("fixed_small", "fixed_large", "learned", "learned_range")
    ),
)
