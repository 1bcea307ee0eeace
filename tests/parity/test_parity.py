"""The table that `jax-ddpm parity` prints, one test a cell; and that a cell can fail."""

import copy

import jax
import numpy as np
import pytest

from jax_ddpm.parity import CASES, Case, run_case
from jax_ddpm.parity.harness import relative_error

pytestmark = pytest.mark.usefixtures("optimized")


# The harness compares dtypes as users mix them: numbers are promoted as NumPy would.
@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


# Minutes of compilation; `jax-ddpm parity` runs them always.
SLOW = {
    ("UNet, learned variance, scale and shift: gradient of every parameter", "float64"),
    ("UNet, learned variance, scale and shift: gradient of every parameter", "float32"),
    ("UNet, labels: gradient of every parameter", "float32"),
    ("UNet, labels, one level: 10 AdamW steps: weights, losses", "float64"),
    ("UNet, 35.7 M parameters: 50 steps of DDIM", "float64"),
    ("UNet, 35.7 M parameters: 50 steps of DDIM", "float32"),
}
CELLS = [
    pytest.param(
        case,
        dtype,
        id=f"{case.name}-{dtype}",
        marks=[pytest.mark.slow] if (case.name, dtype) in SLOW else [],
    )
    for case in CASES
    for dtype in ("float64", "float32")
]


@pytest.mark.parametrize(("case", "dtype"), CELLS)
def test_parity(case, dtype):
    result = run_case(case, dtype)
    assert result.passed, f"error {result.error:.2e}, allowed {result.tolerance:.0e}"


def test_what_is_slow_is_there():
    assert {(case.name, dtype) for case in CASES for dtype in ("float64", "float32")} > SLOW


def test_a_difference_fails():
    values = np.linspace(1, 2, 10)
    wrong = copy.copy(values)
    wrong[3] += 1e-5
    assert not run_case(Case("maths", "wrong", lambda dtype: (wrong, values)), "float32").passed
    assert run_case(Case("maths", "right", lambda dtype: (values, values)), "float32").passed


def test_nan_fails():
    values = np.array([1.0, np.nan])
    assert not run_case(Case("maths", "nan", lambda dtype: (values, values)), "float64").passed


def test_missing_arrays_and_shapes_are_refused():
    with pytest.raises(ValueError, match="expected the structure"):
        relative_error({"a": np.ones(2)}, {"b": np.ones(2)})
    with pytest.raises(ValueError, match="expected shape"):
        relative_error(np.ones((2, 1)), np.ones(2))
