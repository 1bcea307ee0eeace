"""Cases for the training losses, their gradient, and the bound in bits per dimension.

The reference computes in float64 throughout, on the same rounded inputs, as in `maths`.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from jax_ddpm.parity.harness import Case, DType, both, from_torch, images, timesteps
from jax_ddpm.parity.maths import float64, network, schedule, torch_network
from torch_reference.forward import q_sample
from torch_reference.schedule import T, tables

__all__ = ["LOSS_CASES"]


def _loss_case(loss_type: str, **policy: Any) -> Case:
    policy["loss_type"] = loss_type

    def compare(dtype: DType):
        ours, theirs = both("training_losses")
        learned = policy.get("variance_type", "").startswith("learned")
        x_start, noise, t = _pixels(dtype), images(1, dtype), timesteps(T)
        result = jax.jit(partial(ours, schedule(), network(learned), **policy))(x_start, t, noise)
        inputs = map(float64, (x_start, t, noise))
        expected = theirs(tables(torch.float64), torch_network(learned), *inputs, **policy)
        return result, expected.numpy()

    label = ", ".join(str(value) for value in policy.values() if value != loss_type)
    kind = "maths" if loss_type == "mse" else "likelihood"
    return Case(kind, f"training_losses: {loss_type}, {label}", compare)


def _gradient_case(loss_type: str, variance_type: str) -> Case:
    """By the network's output: the channels of the mean, and those of the variance."""
    policy: dict[str, Any] = {"loss_type": loss_type, "variance_type": variance_type}

    def compare(dtype: DType):
        ours, theirs = both("training_losses")
        x_start, noise, t = _pixels(dtype), images(1, dtype), timesteps(T)

        def total(output):
            return jnp.sum(ours(schedule(), lambda x, t: output, x_start, t, noise, **policy))

        x_t = q_sample(tables(torch.float64), *map(float64, (x_start, t, noise)))
        output = torch_network(learned=True)(x_t, float64(t)).requires_grad_()
        inputs = map(float64, (x_start, t, noise))
        loss = theirs(tables(torch.float64), lambda x, t: output, *inputs, **policy).sum()
        expected = from_torch(torch.autograd.grad(loss, output)[0])
        gradient = jax.jit(jax.grad(total))(from_torch(output).astype(dtype))
        return jnp.split(gradient, 2, axis=-1), np.split(expected, 2, axis=-1)

    return Case("likelihood", f"training_losses: gradient, {loss_type}, {variance_type}", compare)


def _bits_case(prediction_type: str, variance_type: str, clip: bool) -> Case:
    policy: dict[str, Any] = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_denoised": clip,
    }

    def compare(dtype: DType):
        ours, theirs = both("bits_per_dim")
        learned = variance_type.startswith("learned")
        x_start, noise = _pixels(dtype)[:2], images(1, dtype, (T, 2, 5, 4, 3))
        result = jax.jit(
            lambda x_start, noise: ours(
                None, schedule(), network(learned), x_start, noise_fn=lambda i: noise[i], **policy
            )
        )(x_start, noise)
        expected = theirs(
            tables(torch.float64),
            torch_network(learned),
            float64(x_start),
            lambda i: float64(noise[i]),
            **policy,
        )
        return tuple(result), tuple(value.numpy() for value in expected)

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
