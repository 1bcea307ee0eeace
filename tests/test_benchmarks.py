"""Outputs are compared before anything is timed, and a record is compared with another."""

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.harness import Contender, race
from benchmarks.report import markdown, moved

pytestmark = pytest.mark.slow

RECORDS = Path(__file__).parents[1] / "benchmarks/results"


@pytest.mark.parametrize("wrong", [1e-7, np.nan])
def test_a_wrong_output_is_not_timed(wrong):
    right, turns = np.linspace(1, 2, 5), []
    theirs = Contender(lambda: turns.append("torch eager"), lambda: right)
    ours = Contender(lambda: turns.append("JAX jit"), lambda: right + wrong)
    contenders = {"JAX jit": ours, "torch eager": theirs}
    with pytest.raises(ValueError, match="got JAX jit by"):
        race(contenders, batch=1, steps=1, tolerance=1e-8, rounds=2)
    assert not turns
    if not np.isnan(wrong):
        row, _ = race(contenders, batch=1, steps=1, tolerance=1e-6, rounds=2)
        assert row["max_relative_difference"] == pytest.approx(5e-8)
        assert turns == 3 * ["JAX jit", "torch eager"]  # the first round is not timed


def results(jax_seconds=0.01):
    seconds = {"JAX jit": jax_seconds, "torch eager": 0.03, "torch.compile, channels_last": 0.02}
    rows = [
        {"contender": name, "batch": 4, "compile_s": None, "seconds_per_step": [s, s, 1.2 * s]}
        for name, s in seconds.items()
    ]
    return {"sampling": rows, "training": rows}


def test_what_moved_by_more_than_the_noise():
    """The noise is what the rounds of either run show, and 3 % between runs."""
    assert moved(results(), results()) == moved(results(), results(jax_seconds=0.0102)) == []
    first, _ = moved(results(), results(jax_seconds=0.02))
    assert first == "sampling, batch 4: 2 (2 – 2) then, 1 (1 – 1) now"
    with pytest.raises(ValueError, match="expected ratios of the same work, got none"):
        moved(results(), {})


@pytest.mark.parametrize(
    "record", sorted(RECORDS.glob("**/[ab]*.json")), ids=lambda path: path.stem
)
def test_each_record_is_rendered_beside_itself(record):
    assert record.with_suffix(".md").read_text() == markdown(json.loads(record.read_text()))
