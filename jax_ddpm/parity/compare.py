"""Is my JAX network the PyTorch one? Output, gradients, optimizer steps and a whole chain."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from itertools import product
from typing import Any, get_args

import jax
import numpy as np
import optax
import torch
from tqdm import tqdm

from jax_ddpm._errors import check_choice, check_kind
from jax_ddpm.parity.difference import first_difference
from jax_ddpm.parity.harness import DType, Report, Result, worst_error
from jax_ddpm.parity.pair import Pair
from jax_ddpm.parity.tolerances import TOLERANCES, Tolerance
from torch_reference.schedule import T

_RATE, _EPS = 1e-4, 1e-5
"""Adam's. With its usual ε of 1e-8 it makes a whole step of a gradient that is only rounding."""

_SMALLEST = 1e-3
"""Of the largest array's scale, the least that an array is compared with: a bias before a norm has
no gradient but rounding, and no scale of its own."""


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
    keep_going: bool = False,
) -> Report:
    """Compare a PyTorch network with a JAX one that should be the same function.

    Both start from the same weights and see the same inputs and noise, once in float64, where only
    a wrong formula is far off, and once in float32, where users compute.

    Args:
      module: the PyTorch network, on the CPU. A copy of it is used, in evaluation mode.
      apply_fn: a Linen module, its `apply`, or any function `(variables, *inputs) -> output`.
      variables_from_torch: `state_dict of arrays -> variables`. Gradients are converted with it
        too, so it may only move and flip axes: `interop.layers_from_torch` does this for the
        usual layers.
      inputs: images first, [batch, height, width, channel]; arrays of four axes are passed to torch
        as NCHW. Floating inputs are cast to the dtype under test, integers stay.
      torch_fn: `(module, *inputs) -> output`, where it is not `module(*inputs)`.
      adam_steps: steps of Adam on a mean squared error; 0 leaves them out.
      chain: also run the tutorial's reverse chain, 200 steps; for networks `(x, t, …)` that predict
        ε, in the shape of `x`.
      tolerances: `parity.tolerances.Tolerance(float64, float32)` of "forward", "gradients",
        "training" and "chain"; by default those that the networks of this library meet.
      dtypes: the precisions, float64 whatever `jax_enable_x64` says.
      keep_going: compare the rest also where the outputs differ.

    Returns:
      A `Report`: `report.passed` is the answer, `report.first_difference` the first module that
        differs. Where the outputs differ, nothing else is compared, unless `keep_going`.

    Raises:
      ValueError: the variables are empty, are not of the dtype under test, the two outputs differ
        in shape, or `tolerances` or `dtypes` have another name.
      TypeError: `module` is no instance of a PyTorch module, or `inputs` is one array.

    Examples:
      >>> from torch import nn
      >>> from jax_ddpm import parity
      >>> module = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
      >>> def port(weights, x, activation=jax.nn.silu):  # weights by torch's names
      ...     h = activation(x @ weights["0.weight"].T + weights["0.bias"])
      ...     return h @ weights["2.weight"].T + weights["2.bias"]
      >>> parity.compare(module, port, dict, [np.eye(3)], chain=False, adam_steps=0).passed
      True
      >>> wrong = lambda weights, x: port(weights, x, jax.nn.relu)
      >>> parity.compare(module, wrong, dict, [np.eye(3)], chain=False).first_difference
      '1'
    """
    check_kind("module", module, torch.nn.Module, "Net()")
    check_kind("inputs", inputs, Sequence, "(x, t)")
    for dtype in dtypes:
        check_choice("dtypes", dtype, DType)
    for kind in tolerances or ():
        check_choice("tolerances", kind, ("forward", "gradients", "training", "chain"))
    limits = {**TOLERANCES, **(tolerances or {})}
    comparisons: list[tuple[str, str, Callable[[Pair], tuple[Any, Any]]]] = [
        ("forward", "output", Pair.outputs),
        ("gradients", "gradient of every parameter", Pair.gradients),
    ]
    if adam_steps:
        name = f"{adam_steps} Adam steps: every weight and loss"
        comparisons.append(("training", name, partial(_adam, adam_steps)))
    if chain:
        comparisons.append(("chain", f"reverse chain: each of {T} states", Pair.chain))
    make = cache(partial(Pair, module, apply_fn, variables_from_torch, inputs, torch_fn=torch_fn))

    def run(dtype: DType, function: Callable[[Pair], Any]) -> Any:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            return function(make(dtype))

    def search() -> tuple[str | None, str]:
        try:
            return run("float64", first_difference)
        except Exception as error:  # no failure of the comparison
            return None, f"no first difference was found: {type(error).__name__}: {error}"

    rows: list[Result] = []
    work = list(product(dtypes, comparisons))
    for dtype, (kind, name, function) in tqdm(work, "comparing", leave=False, disable=None):
        ours, theirs = run(dtype, function)
        if kind == "forward" and (got := ours["output"].shape) != theirs["output"].shape:
            problem = f"expected an output of {theirs['output'].shape}, got {got}"
            name, _ = search()
            where = f"; the first difference is {name}" if name else ""
            raise ValueError(f"apply_fn: {problem}{where}")
        error, worst = worst_error(ours, theirs, _SMALLEST)
        rows.append(Result(kind, name, dtype, error, getattr(limits[kind], dtype), worst))
        if kind == "forward" and not rows[-1].passed and not keep_going:
            break
    name, explanation = (None, "") if all(row.passed for row in rows) else search()
    return Report(tuple(rows), name, explanation)


def _adam(steps: int, pair: Pair) -> tuple[Any, Any]:
    optimizers = optax.adam(_RATE, eps=_EPS), partial(torch.optim.Adam, lr=_RATE, eps=_EPS)
    return pair.training(*optimizers, [(pair.inputs, pair.target)] * steps)
