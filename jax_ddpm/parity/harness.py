"""What a comparison is: the same name on both sides, the same inputs, one number out.

A case makes its inputs from a fixed seed in float64, rounds them to the dtype under test, and
calls both sides. Images travel as NumPy, NHWC for JAX and NCHW for torch.
"""

import importlib
import time
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import torch

import jax_ddpm
from jax_ddpm._table import table
from jax_ddpm.io.arrays import flatten
from jax_ddpm.parity.tolerances import TOLERANCES
from torch_reference.schedule import T

DType = Literal["float64", "float32"]
_REFERENCE = ("schedule", "forward", "reverse", "likelihood", "losses", "models.simple_unet")


class Case(NamedTuple):
    """A labelled comparison, which `run_case` runs.

    Attributes:
      kind: which tolerance applies: "maths", "forward", "gradients", …
      name: what is compared.
      compare: `dtype -> (what JAX computed, what torch computed)`, pytrees of one structure.
    """

    kind: str
    name: str
    compare: Callable[[DType], tuple[Any, Any]]


class Result(NamedTuple):
    """What a comparison measured in one precision."""

    kind: str
    name: str
    dtype: DType
    error: float
    """The largest difference over the largest reference, of the array where that is largest."""
    tolerance: float
    worst: str = ""
    """The path of that array; empty where there is only one."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance (NaN is not)."""
        return self.error <= self.tolerance


class Report(NamedTuple):
    """What comparisons found. Printed, it is a table, and what is known of the first difference.

    Attributes:
      rows: for each comparison and precision, what `run_case` returns.
      first_difference: PyTorch's dotted name of the first module whose output differs though its
        inputs agree. If the fault lies between modules, the module that gets the wrong input; `""`
        if it lies after the last one. None if no output of a module differs: see `passed`.
      explanation: of this difference: errors, the line of code, a likely cause.
    """

    rows: tuple[Result, ...]
    first_difference: str | None = None
    explanation: str = ""

    @property
    def passed(self) -> bool:
        """Whether there are rows, and every error is within its tolerance."""
        return bool(self.rows) and all(row.passed for row in self.rows)

    def __bool__(self) -> bool:
        return self.passed

    def assert_passed(self) -> None:
        """Raises `AssertionError` with the report unless `passed`."""
        if not self.passed:
            raise AssertionError(f"the networks differ\n{self!r}")

    def __repr__(self) -> str:
        dtypes = list(dict.fromkeys(row.dtype for row in self.rows))
        lines: dict[str, dict[str, Result]] = {}
        for row in self.rows:
            lines.setdefault(row.name, {})[row.dtype] = row
        cells = [["error, limit", *(cell for dtype in dtypes for cell in (dtype, "")), "worst in"]]
        for name, results in lines.items():
            errors = [cell for dtype in dtypes for cell in _cells(results.get(dtype))]
            worst = dict.fromkeys(row.worst for row in results.values() if row.error)
            cells.append([name, *errors, " / ".join(worst)])
        printed = table("<" + "><" * len(dtypes) + "<", cells)
        return f"{printed}\n\n{self.explanation}".rstrip()


def _cells(result: Result | None) -> tuple[str, str]:
    if result is None:
        return "", ""
    error = "equal" if result.error == 0 else f"{result.error:.1e}"
    limit = f"{result.tolerance:.0e}" if result.tolerance else "0"
    return error, f"≤ {limit}" if result.passed else f"> {limit} FAILED"


def run_case(case: Case, dtype: DType) -> Result:
    """Run both sides of a certified comparison. Needs `jax_enable_x64`.

    Args:
      case: one of `CASES`.
      dtype: "float64" or "float32".

    Returns:
      `kind`, `name`, `dtype`, `error`, `tolerance`, `worst` (array's path), `seconds`, `passed`.

    Examples:
      >>> from jax_ddpm import parity
      >>> with jax.enable_x64(True):
      ...     parity.run_case(parity.CASES[0], "float64").passed
      True
    """
    start = time.perf_counter()
    with jax.default_matmul_precision("highest"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "schedule: ")  # the tutorial's, at T = 200
        ours, theirs = case.compare(dtype)
    error, worst = worst_error(ours, theirs)
    tolerance, seconds = getattr(TOLERANCES[case.kind], dtype), time.perf_counter() - start
    return Result(case.kind, case.name, dtype, error, tolerance, worst, seconds)


def relative_error(ours: Any, theirs: Any) -> float:
    """The largest difference over the largest reference, the worst over all arrays."""
    return worst_error(ours, theirs)[0]


def worst_error(ours: Any, theirs: Any, smallest: float = 0.0) -> tuple[float, str]:
    """The worst relative error over all arrays, and the path of the array that has it.

    No array is compared with less than `smallest` of the largest array's scale. A reference of
    nothing but zeros has to be met to the bit, and NaN is the worst of all.
    """
    ours_tree, theirs_tree = jax.tree.structure(ours), jax.tree.structure(theirs)
    if ours_tree != theirs_tree or not ours_tree.num_leaves:
        raise ValueError(f"theirs: expected the structure {ours_tree}, got {theirs_tree}")
    exact = {name: np.asarray(value, np.float64) for name, value in flatten(theirs).items()}
    scales = {name: float(np.max(np.abs(value), initial=0)) for name, value in exact.items()}
    least, errors = smallest * max(scales.values()), {}
    for name, value in flatten(ours).items():
        if np.shape(value) != exact[name].shape:
            expected, got = np.shape(value), exact[name].shape
            raise ValueError(f"theirs: expected shape {expected}, got {got}")
        difference = np.abs(np.asarray(value, np.float64) - exact[name])
        error, scale = float(np.max(difference, initial=0)), max(scales[name], least)
        errors[name] = error / scale if scale else error and np.inf
    worst = max(errors, key=lambda name: np.inf if np.isnan(errors[name]) else errors[name])
    return errors[worst], worst


def both(name: str) -> tuple[Any, Any]:
    """The library's function and the reference's, found by the same name."""
    modules = (importlib.import_module(f"torch_reference.{each}") for each in _REFERENCE)
    return getattr(jax_ddpm, name), next(vars(each)[name] for each in modules if name in vars(each))


def evaluate(ours: Callable[..., Any], theirs: Callable[..., Any], *arrays: Any) -> tuple[Any, Any]:
    """What both return for the same arrays: ours compiled, torch in float64."""
    result = jax.jit(ours)(*arrays)
    expected = theirs(*(to_torch(array, "float64") for array in arrays))
    if isinstance(expected, tuple):
        return tuple(result), tuple(map(from_torch, expected))
    return result, from_torch(expected)


def images(seed: int, dtype: DType, shape: tuple[int, ...] = (6, 5, 4, 3)) -> np.ndarray:
    """Standard normal images, NHWC, the same numbers in both precisions up to rounding."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def timesteps(total: int, count: int = 6) -> np.ndarray:
    """`count` steps from 0 to `total - 1`, both ends among them."""
    return np.round(np.linspace(0, total - 1, count)).astype(np.int32)


def schedule(total: int = T) -> jax_ddpm.NoiseSchedule:
    """The tutorial's, of `total` steps."""
    return jax_ddpm.make_schedule(jax_ddpm.linear_beta_schedule(total))


def to_torch(array: Any, dtype: DType | None = None) -> torch.Tensor:
    """NHWC to NCHW, a copy; anything that is not an image keeps its axes. Floating numbers are cast
    to `dtype`, if it is given; integers become torch's usual ones."""
    array = np.asarray(array)
    if array.ndim == 4:
        array = array.transpose(0, 3, 1, 2)
    tensor = torch.from_numpy(array.copy())
    if not tensor.is_floating_point():
        return tensor.long()
    return tensor.to(getattr(torch, dtype)) if dtype else tensor


def from_torch(tensor: torch.Tensor) -> np.ndarray:
    """NCHW to NHWC."""
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def vector(tree: Any) -> np.ndarray:
    """All arrays as one: where some have no gradient but rounding, and no scale of their own."""
    arrays = [np.asarray(each, np.float64) for each in jax.tree.leaves(tree)]
    return np.concatenate([array.ravel() for array in arrays])
