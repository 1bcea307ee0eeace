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
from jax_ddpm.parity import Report, compare
from jax_ddpm.parity.tolerances import Tolerance

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


with torch.random.fork_rng():
    torch.manual_seed(0)
    MODULE = Torch()
convert = partial(layers_from_torch, kinds=layer_kinds(MODULE))


def output_and_gradients(apply_fn, **options):
    """The report without training and chain, for another function on the JAX side."""
    options = {"adam_steps": 0, "chain": False, "dtypes": ("float64",), **options}
    return compare(MODULE, apply_fn, convert, (X, T), **options)


def test_a_network_that_is_the_same_passes():
    """In float64, although x64 is off outside: rounding is 1e-14, not 1e-7. The README's example
    compares in float32 too."""
    assert jnp.ones(1, float).dtype == jnp.float32
    report = compare(MODULE, Flax(), convert, (X, T), dtypes=("float64",))
    assert report.passed, str(report)
    compared = ["output", "gradient of every parameter", "10 Adam steps", "reverse chain"]
    assert [row.name.partition(":")[0] for row in report.rows] == compared
    assert all(row.dtype == "float64" and row.error < 1e-9 for row in report.rows)
    assert "FAILED" not in str(report)
    assert all(parameter.grad is None for parameter in MODULE.parameters())  # a copy was used


def test_what_is_wrong_fails_and_the_layer_is_named():
    """Flax's default ε beside PyTorch's is an error that float32 could be blamed for."""

    def doubled(variables, x, t):
        params = dict(variables["params"])
        params["conv_in"] = {**params["conv_in"], "bias": 2 * params["conv_in"]["bias"]}
        return Flax().apply({"params": params}, x, t)

    for wrong in (lambda *given: jnp.nan * Flax().apply(*given), Flax(1e-6).apply, doubled):
        report = output_and_gradients(wrong, keep_going=True)
        output, gradients = report.rows
        assert [output.name, gradients.name] == ["output", "gradient of every parameter"]
        assert not output.passed and not gradients.passed and not report.passed
        assert str(report).count("FAILED") == 2
    assert (output.worst, gradients.worst) == ("output", "params/conv_in/bias")
    assert gradients.error == pytest.approx(1, rel=0.2)
    assert report.first_difference == "conv_in"


def test_a_report_ends_after_wrong_outputs():
    report = compare(MODULE, Flax(1e-6), convert, (X, T))
    assert [(row.kind, row.dtype) for row in report.rows] == [("forward", "float64")]
    assert report.first_difference == "norm"
    with pytest.raises(AssertionError, match="output .* FAILED(.|\n)*first difference: norm"):
        report.assert_passed()
    assert not Report(()).passed


def test_what_does_not_fit_is_named():
    wide = lambda *given: jnp.tile(Flax(1e-6).apply(*given), 2)
    single = lambda tensors: jax.tree.map(np.float32, convert(tensors))
    for apply_fn, from_torch, words in (
        (wide, convert, r"apply_fn: expected an output of \(2, 8, 8, 3\), got .*; .* is norm"),
        (Flax().apply, single, "expected params/conv_in/bias in float64, got float32"),
        (Flax().apply, lambda tensors: {}, "variables_from_torch: expected arrays, got an empty"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(MODULE, apply_fn, from_torch, (X, T))
    with pytest.raises(ValueError, match="tolerances: expected one of 'forward', .*, got 'output'"):
        output_and_gradients(Flax(), tolerances={"output": Tolerance(0, 0)})


def test_buffers_and_tied_weights_are_not_trained():
    """torch has no gradient for the one, and one for both names of the other."""

    class Tied(tnn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.one = tnn.BatchNorm1d(3), tnn.Linear(3, 3)
            self.other = tnn.Linear(3, 3)
            self.other.weight = self.one.weight

        def forward(self, x):
            return self.other(self.one(self.norm(x)))

    def apply(p, x):
        scale = p["norm.weight"] / jnp.sqrt(p["norm.running_var"] + 1e-5)
        x = (x - p["norm.running_mean"]) * scale + p["norm.bias"]
        return (x @ p["other.weight"].T + p["one.bias"]) @ p["other.weight"].T + p["other.bias"]

    def of_torch(tensors):
        unused = ("norm.num_batches_tracked", "one.weight")
        return {name: value for name, value in tensors.items() if name not in unused}

    compare(Tied(), apply, of_torch, (X[0, 0],), chain=False).assert_passed()
