"""The lines of metrics.jsonl: means, the quarters of the chain, and what a resumed run writes."""

import json

import jax
import numpy as np
import pytest

from jax_ddpm.runs.metrics import MetricsLog, keep_lines, read_metrics
from jax_ddpm.runs.settings import Settings

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

RNG = np.random.default_rng(0)
T = RNG.integers(0, 8, (60, 2))
LOSSES = RNG.uniform(0.1, 1, T.shape)
LOSSES[7, 1] = np.nan


def open_log(path, step, pending):
    """A log of sixty steps, of two images each; the rate falls by 1 in each."""
    rate = {"learning_rate": 60, "learning_rate_schedule": "linear", "warmup_steps": 0}
    return MetricsLog(path, Settings(steps=60, batch_size=2, **rate), 8, step, pending)


def add(log, first, stop):
    losses = LOSSES[first:stop]
    measured = {"loss": losses.mean(1), "grad_norm": 2 * losses.mean(1), "losses": losses}
    log.add(range(first, stop), jax.device_put({**measured, "t": T[first:stop]}))
    return log.collect()


def test_a_line_holds_the_means_since_the_line_before(tmp_path):
    """Also in a run that resumes, from what its checkpoint holds of the line to come."""
    path = tmp_path / "metrics.jsonl"
    log = open_log(path, 0, {})
    assert add(log, 0, 30) == 7, "the first step that is not finite"
    pending = json.loads(json.dumps(log.pending))  # with the checkpoint of step 30
    add(log, 30, 50)
    whole = log.write({"figure": 1.5})
    assert keep_lines(path, 0) == read_metrics(path) == [], "as of step 50"
    log = open_log(path, 30, pending)
    assert add(log, 30, 50) is None
    written = log.write({"figure": 1.5})
    assert written["loss_quarters"] == whole["loss_quarters"]
    losses, t = np.delete(LOSSES[:50], 7, axis=0), np.delete(T[:50], 7, axis=0)
    # Of T = 8 the first quarter is t = 0 and 1.
    quarters = [losses[t // 2 == k].mean() for k in range(4)]
    assert written["loss_quarters"] == pytest.approx(quarters)
    expected = {"step": 50, "dropped": 1, "figure": 1.5, "learning_rate": 11}  # of the last, 49
    expected |= {"loss": losses.mean(), "grad_norm": 2 * losses.mean()}
    assert {name: written[name] for name in expected} == pytest.approx(expected)
    assert {"images_per_second", "waiting", "seconds_left"} <= written.keys()
    (line,) = read_metrics(path)
    assert line.items() <= written.items() and "waiting" not in line
    assert add(log, 50, 60) is None, "the last line is of what is left"
    assert log.write({})["loss"] == pytest.approx(LOSSES[50:].mean())
