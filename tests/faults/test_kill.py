"""kill -9, at any moment: the same command resumes, to the last bit of the same weights."""

import json
import os
import random
import time
from signal import SIGKILL

import numpy as np
import pytest

from jax_ddpm.io.checkpoint import list_checkpoints

# On demand: JAX_DDPM_KILLS=200 pytest -m "" tests/faults/test_kill.py
KILLS = int(os.environ.get("JAX_DDPM_KILLS", "3"))
DIES = f"os.kill(os.getpid(), {int(SIGKILL)})"


def test_killed_at_every_stage(train, tmp_path, assert_same):
    """While a file of a checkpoint is written, while its folder gets its name, just after that,
    while a line of metrics is written, and while samples are drawn.
    """
    folder = tmp_path / "runs/cut"
    for name, count, steps in (
        ("fsync", 3, []),
        ("replace", 5, [20, 30, 40]),  # the line of metrics of step 50 is written
        ("fsync", 7, [20, 30, 40, 50]),
    ):
        command = train(call=(name, count, DIES))
        assert command.end() == -SIGKILL, command.text
        paths = list_checkpoints(folder / "checkpoints")
        assert [int(path.name) for path in paths] == steps
        assert any((folder / "checkpoints").glob(".*.tmp")) == (count != 7)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "lo')
    command = train()
    command.says("sampling")
    command.end(SIGKILL)
    assert not list((folder / "checkpoints").glob(".*"))
    assert_same(folder)


@pytest.mark.slow
def test_killed_at_random_moments(train, tmp_path, assert_same):
    """In the second after the first step: it steps, saves and draws. Three kills a run."""
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        name = f"cut{kills}"
        for _ in range(3):
            command = train(name=name)
            # A run that is finished ends without a step.
            while "step/s" not in command.text and command.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1))
            kills += command.poll() is None
            assert command.end(SIGKILL) in (0, -SIGKILL), command.text
        command = train(name=name)
        assert command.end() == 0, command.text
        assert_same(tmp_path / "runs" / name)


@pytest.mark.patience
def test_killed_on_one_device_then_on_four_then_on_one(train, tmp_path, whole):
    """Another number of devices resumes too, within rounding, and says so."""
    for devices, step in ((1, 10), (4, 30)):
        command = train(devices=devices)
        command.until((tmp_path / f"runs/cut/checkpoints/{step:08d}").exists)
        command.end(SIGKILL)
    command = train(devices=1)
    assert command.end() == 0
    assert "trained by 4 × cpu" in command.text and "the same within rounding" in command.text
    got, expected = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "runs/cut", whole)
    )
    # Adam divides small gradients by themselves, and rounding with them.
    np.testing.assert_allclose(got, expected, rtol=0.02)
