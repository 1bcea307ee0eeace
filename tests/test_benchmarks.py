"""The comparison that comes before any timing can fail, and the report shows what it is given."""

import numpy as np
import pytest

from benchmarks.compare import Disagreement, check_agreement
from benchmarks.report import markdown, plot


def test_a_wrong_output_is_refused():
    right = np.linspace(1, 2, 5)
    outputs = {"torch eager": right, "JAX jit": right + 1e-7}
    assert check_agreement(outputs, "torch eager", 1e-6)["JAX jit"] == pytest.approx(5e-8)
    with pytest.raises(Disagreement, match="JAX jit by 5.0e-08"):
        check_agreement(outputs, "torch eager", 1e-8)
    with pytest.raises(Disagreement):
        check_agreement({**outputs, "JAX jit": right * np.nan}, "torch eager", 1e-6)


def test_report(tmp_path):
    names = ["JAX jit", "torch eager", "torch.compile, channels_last"]
    rows = [
        {"contender": name, "batch": 4, "compile_s": None, "seconds_per_step": [s, s, 2 * s]}
        for name, s in zip(names, (0.01, 0.03, 0.02), strict=True)
    ]
    results = {
        "machine": {
            "date": "2026-01-01T00:00:00",
            "jax_device": "a processor",
            "cores": 2,
            "versions": {"jax": "1"},
            "precision": "float32",
        },
        "sampling": rows,
        "training": rows,
        "overhead": [{"contender": "scan", "seconds_per_step": [1e-6]}],
        "growth": [
            {"timesteps": 10, "program_lines": 5, "temporary_bytes": 2**20, "compile_s": 1.0}
        ],
    }
    assert "| 4 | **JAX jit** | 10.0 (10.0 – 20.0) |  | 3.00 × | 2.00 × |" in markdown(results)
    plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
