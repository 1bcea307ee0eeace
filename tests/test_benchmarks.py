"""The comparison that comes before any timing can fail, and the report shows what it is given."""

import numpy as np
import pytest

from benchmarks.harness import Disagreement, check_agreement
from benchmarks.report import markdown, moved

pytestmark = pytest.mark.slow


def test_a_wrong_output_is_refused():
    right = np.linspace(1, 2, 5)
    outputs = {"torch eager": right, "JAX jit": right + 1e-7}
    assert check_agreement(outputs, "torch eager", 1e-6)["JAX jit"] == pytest.approx(5e-8)
    with pytest.raises(Disagreement, match="JAX jit by 5.0e-08"):
        check_agreement(outputs, "torch eager", 1e-8)
    with pytest.raises(Disagreement):
        check_agreement({**outputs, "JAX jit": right * np.nan}, "torch eager", 1e-6)


def results(jax_seconds=0.01):
    seconds = {"JAX jit": jax_seconds, "torch eager": 0.03, "torch.compile, channels_last": 0.02}
    rows = [
        {"contender": name, "batch": 4, "compile_s": None, "seconds_per_step": [s, s, 1.2 * s]}
        for name, s in seconds.items()
    ]
    machine = {"date": "2026-01-01T00:00:00", "jax_device": "a processor", "cores": 2}
    machine |= {"versions": {"jax": "1"}, "precision": "float32"}
    return {"machine": machine, "sampling": rows, "training": rows}


def test_the_report_and_what_moved_by_more_than_the_noise():
    """The noise is what the rounds of either run show, and 3 % between runs."""
    text = markdown(results())
    assert "| 4 | **JAX jit** | 10.0 (10.0 – 12.0) |  | 3.00 × | 2.00 × |" in text
    ratio = "| tutorial reverse loop, 64×64 | 4 | 2.00 × (2.00 – 2.00) | torch.compile, channels_l"
    assert ratio in text
    assert moved(results(), results()) == moved(results(), results(jax_seconds=0.0102)) == []
    first, _ = moved(results(), results(jax_seconds=0.02))
    assert "tutorial reverse loop, 64×64, batch 4: 2.00 × (2.00 – 2.00) then, 1.00 ×" in first
    with pytest.raises(ValueError, match="expected ratios of the same work, got none"):
        moved(results(), {})
