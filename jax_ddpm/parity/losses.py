"""Cases for the training losses, their gradient, and the bound in bits per dimension.

The reference computes in float64 throughout, on the same rounded inputs, as in `maths`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jax_ddpm as ddpm
from jax_ddpm.parity.harness import Case, DType, both, images, schedule, timesteps
from jax_ddpm.parity.maths import evaluate, evaluate_function, networks
from torch_reference.schedule import T, tables


def _loss_case(loss_type: str, **policy: Any) -> Case:
    def compare(dtype: DType):
        inputs = _pixels(dtype), timesteps(T), images(1, dtype)
        return evaluate_function("training_losses", *inputs, loss_type=loss_type, **policy)

    kind = "maths" if loss_type == "mse" else "likelihood"
    return Case(kind, f"training_losses: {loss_type}, {', '.join(policy.values())}", compare)


def _gradient_case(loss_type: str, variance_type: str) -> Case:
    """By the network's output: the channels of the mean, and those of the variance."""
    policy: dict[str, Any] = {"loss_type": loss_type, "variance_type": variance_type}

    def compare(dtype: DType):
        ours, theirs = both("training_losses")

        def total(output, *inputs):
            return jnp.sum(ours(schedule(), lambda x, t: output, *inputs, **policy))

        def torch_gradient(output, *inputs):
            output.requires_grad_()
            losses = theirs(tables(torch.float64), lambda x, t: output, *inputs, **policy)
            mean, variance = torch.autograd.grad(losses.sum(), output)[0].chunk(2, dim=1)
            return mean, variance

        inputs = _pixels(dtype), timesteps(T), images(1, dtype)
        network, _ = networks(variance_type)
        output = network(ddpm.q_sample(schedule(), *inputs), jnp.asarray(inputs[1]))
        return evaluate(
            lambda *args: jnp.split(jax.grad(total)(*args), 2, axis=-1),
            torch_gradient,
            output,
            *inputs,
        )

    return Case("likelihood", f"training_losses: gradient, {loss_type}, {variance_type}", compare)


def _bits_case(prediction_type: str, variance_type: str, clip: bool) -> Case:
    policy: dict[str, Any] = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_denoised": clip,
    }

    def compare(dtype: DType):
        ours, theirs = both("bits_per_dim")
        network, torch_network = networks(variance_type)

        def bits(x_start, noise):
            draws = {"noise_fn": lambda i: noise[i]}
            return ours(None, schedule(), network, x_start, **draws, **policy)

        def torch_bits(x_start, noise):
            noise = noise.movedim(-1, 2)
            draws = {"noise_fn": lambda i: noise[i]}
            return theirs(tables(torch.float64), torch_network, x_start, **draws, **policy)

        return evaluate(bits, torch_bits, _pixels(dtype)[:2], images(1, dtype, (T, 2, 5, 4, 3)))

    label = f"bits_per_dim: {prediction_type}, {variance_type}" + (", clipped" if clip else "")
    return Case("likelihood", label, compare)


def _pixels(dtype: DType) -> np.ndarray:
    """Images of 8 bits, the first and the last value among them."""
    levels = np.round(np.clip(images(0, "float64"), -1, 1) * 127.5 + 127.5)
    return (levels / 127.5 - 1).astype(dtype)


_PREDICTIONS = ("epsilon", "sample", "v_prediction")

LOSS_CASES = (
    *(_loss_case("mse", prediction_type=name) for name in _PREDICTIONS),
    *(_loss_case("mse", prediction_type=name, weighting="min_snr") for name in _PREDICTIONS),
    *(_loss_case("vb", prediction_type=name) for name in _PREDICTIONS),
    *(_loss_case("vb", variance_type=name) for name in ("fixed_large", "learned", "learned_range")),
    *(
        _loss_case("hybrid", prediction_type=name, variance_type="learned_range")
        for name in _PREDICTIONS
    ),
    _loss_case("hybrid", variance_type="learned", weighting="min_snr"),
    *(_gradient_case("hybrid", name) for name in ("learned", "learned_range")),
    _gradient_case("vb", "learned_range"),
    *(
        _bits_case("epsilon", name, True)
        for name in ("fixed_small", "fixed_large", "learned_range")
    ),
    _bits_case("sample", "fixed_small", False),
    _bits_case("v_prediction", "fixed_small", True),
)
