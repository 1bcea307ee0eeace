"""Is my JAX network the PyTorch one? Output, gradients, optimizer steps and a whole chain.

    report = compare(module, model.apply, from_torch, (x, t))
    print(report)
    assert report.passed

Both sides start from the same weights and see the same inputs and noise, once in float64, where
only a wrong formula is far off, and once in float32, where users compute. Errors are relative, and
each row names the array that is worst: the layer to look at.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, get_args

import jax
import numpy as np
import optax
import torch

from jax_ddpm.parity.harness import DType, worst_error
from jax_ddpm.parity.pair import Pair
from jax_ddpm.parity.tolerances import TOLERANCES, Tolerance
from torch_reference.schedule import T

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
    optimizer = optax.adam(_RATE, eps=_EPS)
    torch_optimizer = partial(torch.optim.Adam, lr=_RATE, eps=_EPS)
    rows: list[Row] = []
    for dtype in dtypes:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            pair = Pair(module, apply_fn, variables_from_torch, inputs, dtype, torch_fn=torch_fn)
            found = [
                ("forward", "output", pair.outputs()),
                ("gradients", "gradient of every parameter", pair.gradients()),
            ]
            if adam_steps:
                what = f"{adam_steps} Adam steps: every weight and loss"
                draws = [(pair.inputs, pair.target)] * adam_steps
                found.append(("training", what, pair.training(optimizer, torch_optimizer, draws)))
            if chain:
                found.append(("chain", f"reverse chain: each of {T} states", pair.chain()))
            for kind, what, (ours, theirs) in found:
                error, worst = worst_error(ours, theirs, _SMALLEST)
                rows.append(Row(what, dtype, error, worst, getattr(limits[kind], dtype)))
    return Report(tuple(rows))
