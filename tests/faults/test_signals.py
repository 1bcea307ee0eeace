"""SIGTERM and Ctrl-C save and end with 130, whatever the process is doing; nothing is damaged."""

import time
from signal import SIGINT, SIGTERM

import pytest

ONCE = [("compiling", SIGTERM), ("stepping", SIGINT), ("sampling", SIGTERM)]
MORE = [("compiling", SIGINT), ("stepping", SIGTERM), ("saving", SIGTERM), ("saving", SIGINT)]
MORE += [("sampling", SIGINT)]


@pytest.mark.parametrize("asked", [ONCE, pytest.param(MORE, marks=pytest.mark.slow)])
def test_asked_at_every_stage(train, tmp_path, steps_of, assert_same, asked):
    """One run is stopped at each stage in turn, and resumes; the next test stops it as it saves."""
    folder = tmp_path / "runs/cut"
    stages = {
        "compiling": lambda: "device(s)" in command.text,
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


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(train, steps_of, tmp_path):
    """In the midst of a save; to wait for its end would take an hour."""
    folder = tmp_path / "runs/cut"
    command = train(call=("fsync", 1, "time.sleep(3600)"))
    command.until(lambda: any(folder.glob("checkpoints/.*.tmp")))
    command.send_signal(SIGINT)
    command.says("stopping after this step")
    time.sleep(0.2)  # two within a tenth of a second count as one
    assert command.end(SIGINT) == 130
    assert "jax-ddpm: stopped; nothing was saved yet" in command.text
    assert steps_of(folder) == []


@pytest.mark.slow
def test_drawing_ends_in_one_line(start, whole, tmp_path):
    command = start("sample", "--run", str(whole), "--num", "200000", "--out", "x.npz")
    command.says("sampling")
    assert command.end(SIGTERM) == 130
    assert "jax-ddpm: stopped\n" in command.text and "Traceback" not in command.text
    assert not (tmp_path / "x.npz").exists()
