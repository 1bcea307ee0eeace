"""SIGTERM and Ctrl-C save and end with 130, whatever the process is doing; nothing is damaged."""

import signal
import time

import pytest

from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint

# The command on a disk that takes its time.
SLOW = """
import os, threading, time
real = os.fsync

def fsync(descriptor):
    if threading.current_thread() is not threading.main_thread():
        time.sleep(5)
    real(descriptor)

os.fsync = fsync
from jax_ddpm.__main__ import main
main()
"""


def steps_of(folder):
    return [load_checkpoint(path).step for path in list_checkpoints(folder / "checkpoints")]


def has_written(folder, pattern):
    return lambda command: any(folder.glob(pattern))


def says(text):
    return lambda command: text in command.text


@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGTERM, signal.SIGINT),
        pytest.param((signal.SIGINT, signal.SIGTERM), marks=pytest.mark.slow),
    ],
    ids=lambda numbers: " ".join(number.name for number in numbers),
)
def test_asked_at_every_stage(train, tmp_path, assert_same, numbers):
    """Compiling, stepping, saving, sampling: one after the other on one run, the two in turn."""
    folder = tmp_path / "runs/cut"
    stages = {
        "compiling": says("device(s)"),
        "stepping": has_written(folder, "checkpoints/0*"),
        "saving": has_written(folder, "checkpoints/.*.tmp"),
        "sampling": says("sampling"),
    }
    for (stage, reached), number in zip(stages.items(), [*numbers, *numbers], strict=True):
        command = train().until(reached).send(number)
        assert command.end() == 130, f"{stage}: {command.text}"
        assert "Traceback" not in command.text, stage
        steps = steps_of(folder)
        if "stopping after" in command.text:
            again = "Ctrl-C again" if number == signal.SIGINT else "SIGINT (Ctrl-C)"
            assert f"stopping after this step; {again} stops at once" in command.text
        if stage == "compiling":
            assert steps == [] and "jax-ddpm: stopped; nothing was saved yet" in command.text
        elif "stopped at step" in command.text:  # saved where it stopped, not a step less
            assert f"stopped at step {steps[-1]} and saved" in command.text, stage
    assert steps[-1] == 240
    words = "stopped; step 240 is saved: the same command resumes from there"
    assert f"jax-ddpm: {words}" in command.text
    assert train().end() == 0
    assert_same(folder)


def test_a_second_ctrl_c_stops_at_once_and_damages_nothing(train, tmp_path, assert_same):
    """In the midst of a save, which here takes half a minute."""
    folder = tmp_path / "runs/cut"
    command = train(program=("-c", SLOW)).until(has_written(folder, "checkpoints/.*.tmp"))
    command.send(signal.SIGINT).until(says("stopping after this step"))
    time.sleep(0.2)
    sent = time.monotonic()
    assert command.send(signal.SIGINT).end() == 130
    assert time.monotonic() - sent < 3
    assert "jax-ddpm: stopped; nothing was saved yet" in command.text
    assert steps_of(folder) == []
    assert train().end() == 0
    assert_same(folder)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_sampling_ends_in_one_line(start, whole, tmp_path, number):
    command = start("sample", "--run", str(whole), "--num", "200000", "--out", "x.npz")
    command.until(says("sampling")).send(number)
    assert command.end() == 130
    assert "jax-ddpm: stopped\n" in command.text and "Traceback" not in command.text
    assert not (tmp_path / "x.npz").exists()
