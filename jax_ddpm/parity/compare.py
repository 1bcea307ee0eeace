"""Is my JAX network the PyTorch one? Output, gradients, optimizer steps and a whole chain.

    report = compare(module, model.apply, from_torch, (x, t))
    print(report)
    assert report.passed

Both sides start from the same weights and see the same inputs and noise, once in float64, where
only a wrong formula is far off, and once in float32, where users compute. Errors are relative, and
each row names the array that is worst: the layer to look at.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

import jax_ddpm as ddpm
from jax_ddpm.io.arrays import flatten
from jax_ddpm.parity.harness import DType, from_torch, images, to_torch, worst_error
from jax_ddpm.parity.tolerances import TOLERANCES, Tolerance
from torch_reference.sampling import sample
from torch_reference.schedule import T

__all__ = ["Report", "Row", "compare"]

_RATE, _EPS = 1e-4, 1e-5
"""Adam's. With its usual ε of 1e-8 it makes a whole step of a gradient that is only rounding."""

_SMALLEST = 1e-3
"""Of the largest array's scale, the least that an array is compared with: a bias before a norm has
no gradient but rounding, and no scale of its own."""


class Row(NamedTuple):
    """One comparison in one precision."""

    what: str
    dtype: DType
    error: float
    """The largest difference over the largest reference, of the array where that is largest."""
    worst: str
    """That array: its path in the variables, a state of the chain, or the output."""
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


class Report(NamedTuple):
    """What `compare` found; printed, it is a table."""

    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every row is within its tolerance."""
        return all(row.passed for row in self.rows)

    def __str__(self) -> str:
        head = ("", "dtype", "error", "limit", "", "worst in")
        cells = [
            (
                row.what,
                row.dtype,
                f"{row.error:.1e}",
                f"{row.tolerance:.0e}",
                "passed" if row.passed else "FAILED",
                row.worst,
            )
            for row in self.rows
        ]
        widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (head, *cells)
        )
        return "\n".join(lines)


def compare(
    module: torch.nn.Module,
    apply_fn: Callable[..., Any],
    variables_from_torch: Callable[[Mapping[str, np.ndarray]], Any],
    inputs: Sequence[Any],
    *,
    torch_fn: Callable[..., torch.Tensor] | None = None,
    adam_steps: int = 10,
    chain: bool = True,
    tolerances: Mapping[str, Tolerance] | None = None,
    dtypes: Sequence[DType] = get_args(DType),
) -> Report:
    """Compare a PyTorch network with a JAX one that should be the same function.

    Args:
      module: the PyTorch network, on the CPU. A copy of it is used, in evaluation mode.
      apply_fn: `(variables, *inputs) -> output`: a Flax module's `apply`, or any function.
      variables_from_torch: `state_dict of arrays -> variables`. Gradients are converted with it
        too, so it may only move and flip axes: `interop.layers_from_torch` does this for the
        usual layers.
      inputs: images first, [batch, height, width, channel]; what has four axes is given to torch
        as NCHW. Floating inputs are cast to the dtype under test, integers stay.
      torch_fn: `(module, *inputs) -> output`, where it is not `module(*inputs)`.
      adam_steps: steps of Adam on a mean squared error; 0 leaves them out.
      chain: also run the tutorial's reverse chain, 200 steps; for networks `(x, t, …)` that predict
        ε, in the shape of `x`.
      tolerances: of "forward", "gradients", "training" and "chain", where they are not to be those
        of `parity.tolerances`, which the networks of this library meet.
      dtypes: the precisions, float64 whatever `jax_enable_x64` says.

    Returns:
      A `Report`; `report.passed` is the answer.

    Raises:
      ValueError: the variables are empty, are not of the dtype under test, or the two outputs
        differ in shape.
    """
    limits = {**TOLERANCES, **(tolerances or {})}
    call = torch_fn or (lambda module, *inputs: module(*inputs))
    rows: list[Row] = []
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            pair = _Pair(module, apply_fn, variables_from_torch, call, inputs, dtype)
            found = [
                ("forward", "output", pair.outputs()),
                ("gradients", "gradient of every parameter", pair.gradients()),
            ]
            if adam_steps:
                what = f"{adam_steps} Adam steps: every weight and loss"
                found.append(("training", what, pair.training(adam_steps)))
            if chain:
                found.append(("chain", f"reverse chain: each of {T} states", pair.chain()))
            for kind, what, (ours, theirs) in found:
                error, worst = worst_error(ours, theirs, _SMALLEST)
                rows.append(Row(what, dtype, error, worst, getattr(limits[kind], dtype)))
    return Report(tuple(rows))


class _Pair:
    """The two networks in one precision."""

    def __init__(self, module, apply_fn, variables_from_torch, call, inputs, dtype: DType) -> None:
        self.dtype: DType = dtype
        self.apply, self.call = apply_fn, call
        self.module = copy.deepcopy(module).eval().to(getattr(torch, dtype))
        self.convert = variables_from_torch
        self.inputs = [_cast(each, dtype) for each in inputs]
        self.variables = jax.tree.map(jnp.asarray, self._converted(self.module.state_dict()))
        leaves = flatten(self.variables)
        if not leaves:
            raise ValueError("variables_from_torch: expected arrays, got an empty tree")
        for name, leaf in leaves.items():
            if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != dtype:
                raise ValueError(
                    f"variables_from_torch: expected {name} in {dtype}, got {leaf.dtype}"
                )

    def outputs(self) -> tuple[Any, Any]:
        ours = np.asarray(jax.jit(self.apply)(self.variables, *self.inputs))
        with torch.no_grad():
            theirs = from_torch(self._torch_output(self.inputs))
        if ours.shape != theirs.shape:
            raise ValueError(f"apply_fn: expected an output of {theirs.shape}, got {ours.shape}")
        self.target = images(1, self.dtype, theirs.shape)
        return {"output": ours}, {"output": theirs}

    def gradients(self) -> tuple[Any, Any]:
        ours = jax.jit(jax.grad(self._loss))(self.variables)
        self._torch_loss().backward()
        return ours, self._torch_gradients()

    def training(self, steps: int) -> tuple[Any, Any]:
        optimizer = optax.adam(_RATE, eps=_EPS)
        torch_optimizer = torch.optim.Adam(self.module.parameters(), lr=_RATE, eps=_EPS)

        @jax.jit
        def step(variables, opt_state):
            loss, grads = jax.value_and_grad(self._loss)(variables)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(variables, updates), opt_state, loss

        variables, opt_state = self.variables, optimizer.init(self.variables)
        ours, theirs = [], []
        before = copy.deepcopy(self.module.state_dict())
        for _ in range(steps):
            variables, opt_state, loss = step(variables, opt_state)
            ours.append(loss)
            torch_optimizer.zero_grad()
            torch_loss = self._torch_loss()
            torch_loss.backward()
            torch_optimizer.step()
            theirs.append(torch_loss.item())
        trained = self._converted(self.module.state_dict())
        self.module.load_state_dict(before)
        return (
            {"losses": np.stack(ours), "weights": variables},
            {"losses": np.stack(theirs), "weights": trained},
        )

    def chain(self) -> tuple[Any, Any]:
        x_T, *rest = self.inputs[0], *self.inputs[2:]
        noise = images(2, self.dtype, (T, *x_T.shape))
        schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(T))

        @jax.jit
        def loop(variables, noise):
            return ddpm.p_sample_loop(
                None,
                schedule,
                lambda x_t, t: self.apply(variables, x_t, t, *rest),
                x_T.shape,
                x_T=x_T,
                noise_fn=lambda i: noise[i],
                clip_denoised=False,
                save_every=1,
            )

        states = np.asarray(loop(self.variables, noise)[1])
        extra = [_to_torch(each) for each in rest]
        theirs = sample(
            lambda x, t: self.call(self.module, x, t, *extra),  # pyright: ignore
            to_torch(x_T),
            lambda i: to_torch(noise[i]),
        )
        names = [f"x_{t}" for t in reversed(range(T))]
        return (
            dict(zip(names, states, strict=True)),
            dict(zip(names, map(from_torch, theirs), strict=True)),
        )

    def _loss(self, variables: Any) -> jax.Array:
        return jnp.mean((self.apply(variables, *self.inputs) - self.target) ** 2)

    def _torch_loss(self) -> torch.Tensor:
        output = self._torch_output(self.inputs)
        return torch.nn.functional.mse_loss(output, to_torch(self.target))

    def _torch_output(self, inputs: Sequence[np.ndarray]) -> torch.Tensor:
        return self.call(self.module, *map(_to_torch, inputs))

    def _torch_gradients(self) -> Any:
        found = {name: value.grad for name, value in self.module.named_parameters()}
        grads = {
            name: torch.zeros_like(value) if found.get(name) is None else found[name]
            for name, value in self.module.state_dict().items()
        }
        self.module.zero_grad()
        return self._converted(grads)

    def _converted(self, tensors: Mapping[str, Any]) -> Any:
        return self.convert({name: each.numpy().copy() for name, each in tensors.items()})


def _cast(value: Any, dtype: DType) -> np.ndarray:
    value = np.asarray(value)
    return value.astype(dtype) if np.issubdtype(value.dtype, np.floating) else value


def _to_torch(value: np.ndarray) -> torch.Tensor:
    tensor = to_torch(value)
    return tensor if tensor.is_floating_point() else tensor.long()
