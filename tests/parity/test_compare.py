"""The door for networks of one's own: right ones pass, and what is wrong is named."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn as tnn

from jax_ddpm.interop import layer_kinds, layers_from_torch
from jax_ddpm.parity import compare
from jax_ddpm.parity.compare import Report, Row
from jax_ddpm.parity.harness import worst_error

pytestmark = pytest.mark.usefixtures("defaults")
X = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
T = np.array([0, 150])
OUTPUT_AND_GRADIENTS = {"adam_steps": 0, "chain": False, "dtypes": ("float64",)}


class Torch(tnn.Module):
    """A U-Net of one level: every kind of layer that has weights, but the embedding."""

    def __init__(self):
        super().__init__()
        self.conv_in = tnn.Conv2d(3, 8, 3, padding=1)
        self.time = tnn.ModuleList([tnn.Linear(1, 8)])
        self.norm = tnn.GroupNorm(2, 8)
        self.down = tnn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.up = tnn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
        self.conv_out = tnn.Conv2d(14, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.conv_in(x) + self.time[0](t[:, None].to(x) / 200)[:, :, None, None]
        h = tnn.functional.silu(self.norm(h))
        up = self.up(tnn.functional.silu(self.down(h)))
        return self.conv_out(torch.cat([h, up], dim=1))


class Flax(nn.Module):
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, t):
        time = nn.Dense(8, name="time_0")(t[:, None].astype(x.dtype) / 200)
        h = nn.Conv(8, (3, 3), padding=1, name="conv_in")(x) + time[:, None, None]
        h = nn.silu(nn.GroupNorm(2, epsilon=self.epsilon, name="norm")(h))
        down = nn.silu(nn.Conv(8, (3, 3), strides=2, padding=1, name="down")(h))
        up = nn.ConvTranspose(6, (4, 4), strides=(2, 2), padding=2, name="up")(down)
        return nn.Conv(3, (3, 3), padding=1, name="conv_out")(jnp.concatenate([h, up], axis=-1))


@pytest.fixture(scope="module")
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Torch()


@pytest.fixture
def convert(module):
    return partial(layers_from_torch, kinds=layer_kinds(module))


@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
def test_a_network_that_is_the_same_passes(module, convert, dtype):
    """In float64 too, although it is off outside: rounding is 1e-14, not 1e-7."""
    assert jnp.ones(1, float).dtype == jnp.float32
    report = compare(module, Flax().apply, convert, (X, T), dtypes=(dtype,))
    assert report.passed, str(report)
    assert [row.what for row in report.rows] == [
        "output",
        "gradient of every parameter",
        "10 Adam steps: every weight and loss",
        "reverse chain: each of 200 states",
    ]
    assert {row.dtype for row in report.rows} == {dtype}
    assert all(row.error < (1e-9 if dtype == "float64" else 1e-3) for row in report.rows)
    assert "reverse chain: each of 200 states" in str(report) and "FAILED" not in str(report)
    assert all(parameter.grad is None for parameter in module.parameters())  # a copy was used


def test_another_epsilon_is_found_in_float64(module, convert):
    """Flax's default beside PyTorch's: an error that float32 could be blamed for."""
    apply_fn = Flax(epsilon=1e-6).apply
    report = compare(module, apply_fn, convert, (X, T), **OUTPUT_AND_GRADIENTS)
    assert not report.passed and "FAILED" in str(report)
    assert [row.what for row in report.rows] == ["output", "gradient of every parameter"]
    assert not any(row.passed for row in report.rows)


def test_the_layer_that_is_wrong_is_named(module, convert):
    def wrong(variables, x, t):
        params = dict(variables["params"])
        params["down"] = {**params["down"], "bias": 2 * params["down"]["bias"]}
        return Flax().apply({"params": params}, x, t)

    output, gradients = compare(module, wrong, convert, (X, T), **OUTPUT_AND_GRADIENTS).rows
    assert (output.worst, output.passed) == ("output", False)
    assert gradients.worst == "params/down/bias" and gradients.error == pytest.approx(1, rel=0.2)


def test_nan_zeros_and_nothing_have_a_meaning(module, convert):
    def nan(variables, x, t):
        return jnp.nan * Flax().apply(variables, x, t)

    report = compare(module, nan, convert, (X, T), **OUTPUT_AND_GRADIENTS)
    assert not any(row.passed for row in report.rows)
    zeros, ones = np.zeros(3), np.ones(3)
    assert worst_error({"a": zeros, "b": ones}, {"a": zeros, "b": ones}) == (0, "a")
    assert worst_error({"a": 1e-300 * ones}, {"a": zeros}) == (np.inf, "a")
    assert worst_error({"a": np.nan * ones, "b": 2 * ones}, {"a": ones, "b": ones})[1] == "a"
    assert not Row("", "float64", np.nan, "", 1.0).passed and Report(()).passed
    with pytest.raises(ValueError, match="variables_from_torch: expected arrays, got an empty"):
        compare(module, Flax().apply, lambda tensors: {}, (X, T))


def test_what_does_not_fit_is_named(module, convert):
    def wide(variables, x, t):
        return jnp.tile(Flax().apply(variables, x, t), 2)

    def single(tensors):
        return jax.tree.map(np.float32, convert(tensors))

    with pytest.raises(ValueError, match=r"apply_fn: expected an output of \(2, 8, 8, 3\), got"):
        compare(module, wide, convert, (X, T))
    with pytest.raises(ValueError, match="expected params/conv_in/bias in float64, got float32"):
        compare(module, Flax().apply, single, (X, T))
