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
from jax_ddpm.parity.compare import Report

pytestmark = pytest.mark.usefixtures("defaults")
X = np.random.default_rng(0).standard_normal((2, 8, 8, 3))
T = np.array([0, 150])


class Torch(tnn.Module):
    def __init__(self):
        super().__init__()
        self.conv_in = tnn.Conv2d(3, 8, 3, padding=1)
        self.time = tnn.ModuleList([tnn.Linear(1, 8)])
        self.norm = tnn.GroupNorm(2, 8)
        self.conv_out = tnn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t):
        h = self.conv_in(x) + self.time[0](t[:, None].to(x) / 200)[:, :, None, None]
        return self.conv_out(tnn.functional.silu(self.norm(h)))


class Flax(nn.Module):
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x, t):
        time = nn.Dense(8, name="time_0")(t[:, None].astype(x.dtype) / 200)
        h = nn.Conv(8, (3, 3), padding=1, name="conv_in")(x) + time[:, None, None]
        h = nn.silu(nn.GroupNorm(2, epsilon=self.epsilon, name="norm")(h))
        return nn.Conv(3, (3, 3), padding=1, name="conv_out")(h)


@pytest.fixture(scope="module")
def module():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Torch()


@pytest.fixture
def convert(module):
    return partial(layers_from_torch, kinds=layer_kinds(module))


@pytest.fixture
def output_and_gradients(module, convert):
    """The two rows, for another function on the JAX side."""
    options = {"adam_steps": 0, "chain": False, "dtypes": ("float64",)}
    return lambda apply_fn: compare(module, apply_fn, convert, (X, T), **options).rows


def test_a_network_that_is_the_same_passes(module, convert):
    """In float64, although x64 is off outside: rounding is 1e-14, not 1e-7. The README's example
    compares in float32 too."""
    assert jnp.ones(1, float).dtype == jnp.float32
    report = compare(module, Flax().apply, convert, (X, T), dtypes=("float64",))
    assert report.passed, str(report)
    assert [row.what for row in report.rows] == [
        "output",
        "gradient of every parameter",
        "10 Adam steps: every weight and loss",
        "reverse chain: each of 200 states",
    ]
    assert all(row.dtype == "float64" and row.error < 1e-9 for row in report.rows)
    assert "reverse chain: each of 200 states" in str(report) and "FAILED" not in str(report)
    assert all(parameter.grad is None for parameter in module.parameters())  # a copy was used


@pytest.mark.parametrize(
    "apply_fn",
    [Flax(epsilon=1e-6).apply, lambda *given: jnp.nan * Flax().apply(*given)],
    ids=["epsilon", "NaN"],
)
def test_what_is_wrong_fails(output_and_gradients, apply_fn):
    """Flax's default ε beside PyTorch's is an error that float32 could be blamed for."""
    rows = output_and_gradients(apply_fn)
    assert [row.what for row in rows] == ["output", "gradient of every parameter"]
    assert not any(row.passed for row in rows) and not Report(rows).passed
    assert str(Report(rows)).count("FAILED") == 2


def test_the_layer_that_is_wrong_is_named(output_and_gradients):
    def wrong(variables, x, t):
        params = dict(variables["params"])
        params["conv_in"] = {**params["conv_in"], "bias": 2 * params["conv_in"]["bias"]}
        return Flax().apply({"params": params}, x, t)

    output, gradients = output_and_gradients(wrong)
    assert (output.worst, output.passed) == ("output", False)
    assert gradients.worst == "params/conv_in/bias" and gradients.error == pytest.approx(1, rel=0.2)


def test_what_does_not_fit_is_named(module, convert):
    wide = lambda *given: jnp.tile(Flax().apply(*given), 2)
    single = lambda tensors: jax.tree.map(np.float32, convert(tensors))
    for apply_fn, from_torch, words in (
        (wide, convert, r"apply_fn: expected an output of \(2, 8, 8, 3\), got"),
        (Flax().apply, single, "expected params/conv_in/bias in float64, got float32"),
        (Flax().apply, lambda tensors: {}, "variables_from_torch: expected arrays, got an empty"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(module, apply_fn, from_torch, (X, T))
