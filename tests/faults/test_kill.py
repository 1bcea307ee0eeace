"""kill -9, at any moment: the same command resumes, to the last bit of the same weights."""

import json
import os
import random
import time

import numpy as np
import pytest

# On demand: JAX_DDPM_KILLS=200 pytest tests/faults/test_kill.py; .ci/run asks for 9.
KILLS = int(os.environ.get("JAX_DDPM_KILLS", "3"))

# Runs the command, and dies of a real SIGKILL inside one call of the thread that saves.
DIES = """
import os, signal, sys, threading
name, count = sys.argv.pop(1), int(sys.argv.pop(1))
real = getattr(os, name)

def call(*arguments):
    global count
    if threading.current_thread() is not threading.main_thread():
        count -= 1
        if count == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)

setattr(os, name, call)
from jax_ddpm.__main__ import main
main()
"""


def test_killed_at_random_moments(train, start, tmp_path, whole, assert_same, capsys):
    """In the two seconds after the first step: it steps, saves and draws. Three kills a run."""
    moments, kills, runs = random.Random(0), 0, 0
    while kills < KILLS:
        runs += 1
        name = f"cut{runs}"
        for _ in range(3):
            command = train(name=name)
            limit = time.monotonic() + 120
            # A run that is finished ends without a step.
            while "step/s" not in command.text and command.process.poll() is None:
                assert time.monotonic() < limit, command.text
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 2))
            kills += command.process.poll() is None
            command.process.kill()
            assert command.end() in (0, -9), command.text
        command = train(name=name)
        assert command.end() == 0, command.text
        assert_same(tmp_path / "runs" / name)
    pictures = []
    for run in (whole, tmp_path / "runs/cut1"):
        command = start("sample", "--run", str(run), "--num", "4", "--out", "x.npz")
        assert command.end() == 0, command.text
        assert np.load(tmp_path / "x.npz")["samples"].shape == (4, 8, 8, 1)
        pictures.append((tmp_path / "x.npz").read_bytes())
    assert pictures[0] == pictures[1]
    with capsys.disabled():
        print(f"\n{kills} kills over {runs} runs, each run to the last bit of the whole one")


def test_killed_inside_a_save(train, tmp_path, assert_same):
    """Inside a file, when all are written, before the folder gets its name, and just after."""
    for call, count in (("fsync", 3), ("fsync", 6), ("rename", 2), ("fsync", 7)):
        command = train(program=("-c", DIES, call, str(count)))
        assert command.end() == -9, command.text
        leftovers = list((tmp_path / "runs/cut/checkpoints").glob(".*"))
        assert bool(leftovers) == (count != 7)
    assert train().end() == 0
    assert not list((tmp_path / "runs/cut/checkpoints").glob(".*"))
    assert_same(tmp_path / "runs/cut")


def test_killed_while_a_line_of_metrics_is_written(train, tmp_path, assert_same):
    command = train().until(lambda command: (tmp_path / "runs/cut/checkpoints/00000100").exists())
    command.process.kill()
    command.end()
    with (tmp_path / "runs/cut/metrics.jsonl").open("a") as file:
        file.write('{"step": 150, "lo')
    assert train().end() == 0
    assert_same(tmp_path / "runs/cut")


@pytest.mark.slow
def test_killed_on_one_device_then_on_four_then_on_one(train, tmp_path, whole):
    """Another number of devices resumes too, within rounding, and says so."""
    for devices, step in ((1, 40), (4, 120)):
        folder = tmp_path / f"runs/cut/checkpoints/{step:08d}"
        command = train(devices=devices).until(lambda command, folder=folder: folder.exists())
        command.process.kill()
        command.end()
    command = train(devices=1)
    assert command.end() == 0
    assert "trained by 4 × cpu" in command.text and "the same within rounding" in command.text
    got, expected = (
        [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (tmp_path / "runs/cut", whole)
    )
    # Adam divides small gradients by themselves, and rounding with them.
    np.testing.assert_allclose(got, expected, rtol=0.02)
