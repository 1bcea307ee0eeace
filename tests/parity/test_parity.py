"""The table that `jax-ddpm parity` prints, one test a cell; and that a cell can fail.

The first circle (see conftest.py) compares in float64, where a wrong formula stands out from
rounding; the second adds float32.
"""

import jax
import numpy as np
import pytest

from jax_ddpm.parity import CASES, Case, run_case
from jax_ddpm.parity.harness import worst_error
from jax_ddpm.parity.networks import Setting, tutorial_cases


# The harness compares dtypes as users mix them: numbers are promoted as NumPy would.
@pytest.fixture(autouse=True)
def standard_promotion():
    with jax.numpy_dtype_promotion("standard"):
        yield


# Slow rows, whose formulas other rows compare too: the circles of their float64 and float32 tests.
CIRCLES = {
    "10 Adam steps: weights, EMA, losses": ("first", "patience"),
    "100 Adam steps: weights, EMA, losses": ("slow", "patience"),
    "UNet, diffusers' defaults: output": ("slow", "slow"),
    "UNet, learned variance, scale and shift: output": ("slow", "slow"),
    "UNet, labels, three layers: output": ("slow", "patience"),
    "UNet, odd channels, groups and heads: output": ("first", "patience"),
    "UNet, attention at every level: output": ("first", "patience"),
    "UNet, no attention in the middle: output": ("slow", "patience"),
    "UNet, heads wider than the first level: output": ("slow", "patience"),
    "UNet, Dhariwal & Nichol's: output": ("first", "patience"),
    "UNet, residual and other resampling: output": ("slow", "patience"),
    "UNet, learned variance, scale and shift: gradient of every parameter": ("patience",) * 2,
    "UNet, labels: gradient of every parameter": ("first", "patience"),
    "UNet, labels, one level: 10 AdamW steps: weights, losses": ("patience", "patience"),
    "UNet, 35.7 M parameters: output": ("patience", "patience"),
    "UNet, 35.7 M parameters: 50 steps of DDIM": ("patience", "patience"),
    "guided-diffusion's, 512×512: output": ("slow", "patience"),
    # OpenAI's own logits and score are compared in tests/interop/test_openai.py.
    "classifier, attention: logits, ∇ log p(y | x_t)": ("patience", "patience"),
    "classifier, adaptive: logits": ("slow", "patience"),
    "classifier, spatial: logits": ("slow", "patience"),
    "classifier, spatial_v2: logits": ("slow", "patience"),
}
TEN_STEPS = [case for case in tutorial_cases(Setting(adam_steps=10)) if "Adam" in case.name]
MARKS = {"first": (), "slow": (pytest.mark.slow,), "patience": (pytest.mark.patience,)}
CELLS = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}", marks=MARKS[circle])
    for case in (*CASES, *TEN_STEPS)
    for dtype, circle in zip(
        ("float64", "float32"), CIRCLES.get(case.name, ("first", "slow")), strict=True
    )
]


@pytest.mark.parametrize(("case", "dtype"), CELLS)
def test_parity(case, dtype):
    result = run_case(case, dtype)
    assert result.passed, f"error {result.error:.2e}, allowed {result.tolerance:.0e}"


def test_a_difference_and_nan_fail():
    values = np.linspace(1, 2, 10)
    for number, passes in ((values[3], True), (values[3] + 1e-5, False), (np.nan, False)):
        ours = np.where(np.arange(10) == 3, number, values)
        case = Case("maths", "of a number", lambda _, ours=ours: (ours, values))
        assert all(run_case(case, dtype).passed == passes for dtype in ("float64", "float32"))


def test_the_worst_array_is_named_and_what_cannot_be_compared_is_refused():
    zeros, ones = np.zeros(3), np.ones(3)
    assert worst_error({"a": zeros, "b": ones}, {"a": zeros, "b": ones}) == (0, "a")
    assert worst_error({"a": 1e-300 * ones}, {"a": zeros}) == (np.inf, "a")
    assert worst_error({"a": np.nan * ones, "b": 2 * ones}, {"a": ones, "b": ones})[1] == "a"
    with pytest.raises(ValueError, match="expected the structure"):
        worst_error({"a": ones}, {"b": ones})
    with pytest.raises(ValueError, match="expected shape"):
        worst_error(ones[:, None], ones)
