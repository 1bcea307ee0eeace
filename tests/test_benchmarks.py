"""Outputs are compared before anything is timed, and a record is compared with another."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accelerator
from benchmarks.harness import Contender, race
from benchmarks.report import markdown, moved
from torch_reference.models.simple_unet import SimpleUNet

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
    row = lambda name, s: {"contender": name, "batch": 4, "seconds_per_step": [s, s, 1.2 * s]}
    rows = [row(*each) | {"compile_s": None} for each in seconds.items()]
    return {"sampling": rows, "training": rows}


def test_what_moved_by_more_than_the_noise():
    """The noise is what the rounds of either run show, and 3 % between runs."""
    assert moved(results(), results()) == moved(results(), results(jax_seconds=0.0102)) == []
    first, _ = moved(results(), results(jax_seconds=0.02))
    assert first == "sampling, batch 4: 2 (2 – 2) then, 1 (1 – 1) now"
    with pytest.raises(ValueError, match="expected ratios of the same work, got none"):
        moved(results(), {})


@pytest.mark.parametrize("record", sorted(RECORDS.glob("**/[ab]*.json")), ids=lambda x: x.stem)
def test_each_record_is_rendered_beside_itself(record):
    assert record.with_suffix(".md").read_text() == markdown(json.loads(record.read_text()))


@pytest.fixture
def record(monkeypatch, tmp_path, defaults):
    """Runs `python -m benchmarks accelerator` in tiny sizes: its exit code and what it wrote."""
    # Set before, so that what the command sets is taken back.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["", *arguments, "--tiny", "--out", str(tmp_path)])
        with pytest.raises(SystemExit) as end:
            accelerator.main()
        return end.value.code, json.loads((tmp_path / "accelerator-cpu.json").read_text())

    return run


@pytest.mark.patience
def test_all_parts(record, monkeypatch):
    """Without diffusers, whose parts are left out."""
    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d", None)
    code, parts = record("--target", "h200")
    rows = {part: parts[part] for part in accelerator.PARTS}
    assert not code and rows["resume"][0]["status"] == "passed"
    assert {row["status"] for row in rows["ddpm_cifar10"]} == {"left out"}
    assert {row["status"] for row in rows["tutorial"]} == {"timed"}
    left = [row["name"] for row in rows["parity"] if row["status"] != "passed"]
    assert left == ["UNet, Ho et al.'s: output"] * 2


def test_a_wrong_output_fails(record, monkeypatch, capsys):
    right = SimpleUNet.forward
    monkeypatch.setattr(SimpleUNet, "forward", lambda *args: 1.1 * right(*args))
    code, parts = record("tutorial", "--arithmetic", "float32")
    assert code and {row["status"] for row in parts["tutorial"]} == {"failed"}
    assert "ValueError: expected outputs within 1e-03 of torch eager's" in capsys.readouterr().out
