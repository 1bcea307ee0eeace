"""After kill -9, at any moment, the same command resumes, to the last bit of the same weights.
SIGTERM and Ctrl-C save and end with 130, whatever the process is doing; nothing is damaged."""

import os
import random
import time
from signal import SIGINT, SIGKILL, SIGTERM

import pytest

from jax_ddpm.io.checkpoint import list_checkpoints

# On demand: JAX_DDPM_KILLS=200 pytest -m "" tests/faults/test_interrupted.py
KILLS = int(os.environ.get("JAX_DDPM_KILLS", "3"))
DIES = f"os.kill(os.getpid(), {int(SIGKILL)})"


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "runs/cut"


def test_killed_at_every_stage(train, folder, assert_same):
    """While a file of a checkpoint is written, while its folder gets its name, just after that,
    while a line of metrics is written, and while samples are drawn.
    """
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
    command.until(lambda: "sampling" in command.text)
    command.end(SIGKILL)
    assert not list((folder / "checkpoints").glob(".*"))
    assert_same(folder)


@pytest.mark.slow
def test_killed_at_random_moments(train, tmp_path, assert_same):
    """In the second after it begins to step: it steps, saves and draws. Three kills a run."""
    moments, kills = random.Random(0), 0
    while kills < KILLS:
        name = f"cut{kills}"
        for _ in range(3):
            command = train(name=name)
            # A run that is finished ends without a step.
            while "training: " not in command.text and command.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 1))
            kills += command.poll() is None
            assert command.end(SIGKILL) in (0, -SIGKILL), command.text
        command = train(name=name)
        assert command.end() == 0, command.text
        assert_same(tmp_path / "runs" / name)


ONCE = [("compiling", SIGTERM), ("stepping", SIGINT), ("sampling", SIGTERM)]
MORE = [("compiling", SIGINT), ("stepping", SIGTERM), ("saving", SIGTERM), ("saving", SIGINT)]
MORE += [("sampling", SIGINT)]


@pytest.mark.parametrize("asked", [ONCE, pytest.param(MORE, marks=pytest.mark.slow)])
def test_asked_at_every_stage(train, folder, steps_of, assert_same, asked):
    """One run is stopped at each stage in turn, and resumes; the next test stops it as it saves."""
    stages = {
        "compiling": lambda: " device" in command.text,
        "stepping": lambda: any(folder.glob("checkpoints/0*")),
        "saving": lambda: any(folder.glob("checkpoints/.*.tmp")),
        "sampling": lambda: "sampling" in command.text,
    }
    for stage, number in asked:
        command = train()
        command.until(stages[stage])
        assert command.end(number) == 130, f"{stage}: {command.text}"
        assert "Traceback" not in command.text, stage
        steps = steps_of(folder)
        if stage == "compiling":
            assert steps == [] and "jax-ddpm: stopped; nothing was saved yet" in command.text
        elif "stopped at step" in command.text:  # saved where it stopped, not a step less
            assert f"stopped at step {steps[-1]} and saved" in command.text, stage
    words = "stopped; step 60 is saved: the same command resumes from there"
    assert steps[-1] == 60 and f"jax-ddpm: {words}" in command.text
    assert_same(folder)


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(train, steps_of, folder):
    """In the midst of a save; to wait for its end would take an hour."""
    command = train(call=("fsync", 1, "time.sleep(3600)"))
    command.until(lambda: any(folder.glob("checkpoints/.*.tmp")))
    command.send_signal(SIGINT)
    command.until(lambda: "stopping after this step" in command.text)
    time.sleep(0.2)  # two within a tenth of a second count as one
    assert command.end(SIGINT) == 130
    assert "jax-ddpm: stopped; nothing was saved yet" in command.text
    assert steps_of(folder) == []


@pytest.mark.slow
def test_drawing_ends_in_one_line(start, whole, tmp_path):
    flags = ("--run", str(whole), "--num", "200000", "--out", "x.npz")
    command = start("-m", "jax_ddpm", "sample", *flags)
    command.until(lambda: "sampling" in command.text)
    assert command.end(SIGTERM) == 130
    assert "jax-ddpm: stopped\n" in command.text and "Traceback" not in command.text
    assert not (tmp_path / "x.npz").exists()
