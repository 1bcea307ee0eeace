"""Cases for the schedule, the forward process, a reverse step, losses and the bound.

The reference computes in float64 also where the library computes in float32, on the same
rounded inputs: the error is then the library's own.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_ddpm as ddpm
from jax_ddpm.parity.harness import Case, DType, both, evaluate, images, schedule, timesteps
from torch_reference.schedule import T, tables


def _inputs(dtype: DType) -> tuple[np.ndarray, ...]:
    """Images, steps, other images, and images of 8 bits."""
    return images(0, dtype), timesteps(T), images(1, dtype), _pixels(dtype)


def _pixels(dtype: DType) -> np.ndarray:
    """Images of 8 bits, the first and the last value among them."""
    levels = np.round(np.clip(images(0, "float64"), -1, 1) * 127.5 + 127.5)
    return (levels / 127.5 - 1).astype(dtype)


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


def _function_case(name: str, order: str = "012", kind: str = "maths", **policy: Any) -> Case:
    """A function of the schedule, a network if it has a policy, and `_inputs` in this order."""

    def compare(dtype: DType):
        ours, theirs = both(name.partition(":")[0])
        model, torch_model = ([each] if policy else [] for each in networks(**policy))
        ours = partial(ours, schedule(), *model, **policy)
        theirs = partial(theirs, tables(torch.float64), *torch_model, **policy)
        return evaluate(ours, theirs, *(_inputs(dtype)[int(place)] for place in order))

    return Case(kind, name, compare)


def _policy(prediction_type: str, variance_type: str, clip: bool) -> tuple[str, dict[str, Any]]:
    """Its label, and the keywords."""
    names = {"prediction_type": prediction_type, "variance_type": variance_type}
    label = ", ".join([*names.values(), *["clipped"] * clip])
    return label, {**names, "clip_denoised": clip}


def _p_mean_variance_case(*how: Any) -> Case:
    label, policy = _policy(*how)
    return _function_case(f"p_mean_variance: {label}", "01", **policy)


def _loss_case(loss_type: str, **policy: Any) -> Case:
    kind = "maths" if loss_type == "mse" else "likelihood"
    name = f"training_losses: {', '.join([loss_type, *policy.values()])}"
    return _function_case(name, "312", kind, loss_type=loss_type, **policy)


def _gradient_case(loss_type: str, variance_type: str) -> Case:
    """By the network's output: the channels of the mean, and those of the variance."""
    policy: dict[str, Any] = {"loss_type": loss_type, "variance_type": variance_type}

    def compare(dtype: DType):
        ours, theirs = both("training_losses")

        def total(output, *inputs):
            return jnp.sum(ours(schedule(), lambda x, t: output, *inputs, **policy))

        def gradient(*args):
            return jnp.split(jax.grad(total)(*args), 2, axis=-1)

        def torch_gradient(output, *inputs):
            output.requires_grad_()
            losses = theirs(tables(torch.float64), lambda x, t: output, *inputs, **policy)
            mean, variance = torch.autograd.grad(losses.sum(), output)[0].chunk(2, dim=1)
            return mean, variance

        inputs = _pixels(dtype), *_inputs(dtype)[1:3]
        network, _ = networks(variance_type)
        output = network(ddpm.q_sample(schedule(), *inputs), jnp.asarray(inputs[1]))
        return evaluate(gradient, torch_gradient, output, *inputs)

    return Case("likelihood", f"training_losses: gradient, {loss_type}, {variance_type}", compare)


def _bits_case(*how: Any) -> Case:
    label, policy = _policy(*how)

    def compare(dtype: DType):
        ours, theirs = both("bits_per_dim")
        network, torch_network = networks(policy["variance_type"])

        def bits(x_start, noise):
            draw = noise.__getitem__
            return ours(None, schedule(), network, x_start, noise_fn=draw, **policy)

        def torch_bits(x_start, noise):
            draw = noise.movedim(-1, 2).__getitem__
            return theirs(tables(torch.float64), torch_network, x_start, noise_fn=draw, **policy)

        return evaluate(bits, torch_bits, _pixels(dtype)[:2], images(1, dtype, (T, 2, 5, 4, 3)))

    return Case("likelihood", f"bits_per_dim: {label}", compare)


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


_BETAS = ("linear", "scaled_linear", "cosine", "sigmoid")
_TABLES = ("alphas_cumprod", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod")
_CONVERSIONS = ("xstart_from_eps", "eps_from_xstart", "v", "xstart_from_v", "eps_from_v")
_PREDICTIONS = ("epsilon", "sample", "v_prediction")
_VARIANCES = ("fixed_small", "fixed_large", "learned", "learned_range")

MATHS_CASES = (
    *(_schedule_case(f"{name}_beta_schedule", steps) for name in _BETAS for steps in (200, 1000)),
    *(_tables_case(name) for name in (*_TABLES, "posterior_variance")),
    _function_case("q_sample"),
    _function_case("q_mean_variance", "01"),
    _function_case("q_posterior_mean_variance", "021"),
    *(_function_case(f"predict_{name}") for name in _CONVERSIONS),
    *(_p_mean_variance_case(name, "fixed_small", True) for name in _PREDICTIONS),
    _p_mean_variance_case("v_prediction", "fixed_small", False),
    *(_p_mean_variance_case("epsilon", name, False) for name in _VARIANCES),
)
LOSS_CASES = (
    *(_loss_case("mse", prediction_type=name) for name in _PREDICTIONS),
    *(_loss_case("mse", prediction_type=name, weighting="min_snr") for name in _PREDICTIONS),
    *(_loss_case("vb", prediction_type=name) for name in _PREDICTIONS),
    *(_loss_case("vb", variance_type=name) for name in _VARIANCES[1:]),
    *(_loss_case("hybrid", prediction_type=n, variance_type="learned_range") for n in _PREDICTIONS),
    _loss_case("hybrid", variance_type="learned", weighting="min_snr"),
    *(_gradient_case("hybrid", name) for name in ("learned", "learned_range")),
    _gradient_case("vb", "learned_range"),
    *(_bits_case("epsilon", n, True) for n in ("fixed_small", "fixed_large", "learned_range")),
    _bits_case("sample", "fixed_small", False),
    _bits_case("v_prediction", "fixed_small", True),
)
