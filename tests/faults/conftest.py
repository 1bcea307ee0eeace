"""Trainings of a few seconds, in processes of their own, to be stopped at any moment."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

STEPS = 240
TRAIN = [
    *("train", "--model", "simple", "--batch-size", "8", "--timesteps", "4"),
    *("--steps", str(STEPS), "--checkpoint-every", "10"),
    *("--image-size", "8", "--crop", "random", "--flip"),
]


class Command:
    """A running `jax-ddpm`, or another program with the same output."""

    def __init__(self, *arguments, cwd, cache, program=("-m", "jax_ddpm"), devices=2, **options):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
        # Compiled once, as users compile it, and run many times.
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "0"
        self.output = Path(cwd) / f"output-{time.monotonic_ns()}"
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *program, *arguments],
                cwd=cwd,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                **options,
            )

    def until(self, condition, seconds=120):
        """Wait until `condition(self)`; fails if the process ends before."""
        limit = time.monotonic() + seconds
        while not condition(self):
            assert self.process.poll() is None, f"ended before: {self.text}"
            assert time.monotonic() < limit, f"not in {seconds} s: {self.text}"
            time.sleep(0.003)
        return self

    def send(self, number):
        self.process.send_signal(number)
        return self

    def end(self, seconds=120):
        """The exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise AssertionError(f"not ended in {seconds} s: {self.text}") from None

    @property
    def text(self):
        return self.output.read_text(errors="replace")


@pytest.fixture(scope="session")
def cache(tmp_path_factory, testrun_uid):
    """Compiled programs of these processes alone: one that is killed may leave half of one."""
    folder = tmp_path_factory.getbasetemp().parent / f"cache-{testrun_uid}"  # of all workers
    yield folder
    if "PYTEST_XDIST_WORKER" not in os.environ:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """The training, of images that need no other package to be read."""
    path = tmp_path_factory.mktemp("images") / "x.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (100, 10, 12), np.uint8))
    return (*TRAIN, "--data", str(path))


@pytest.fixture
def start(tmp_path, cache):
    """Start a command in a folder of the test's own."""
    started = []

    def run(*arguments, **options):
        started.append(Command(*arguments, cwd=tmp_path, cache=cache, **options))
        return started[-1]

    yield run
    for command in started:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()


@pytest.fixture
def train(start, command):
    """Start the training: the same command every time, but for what is said."""

    def run(*extra, name="cut", **options):
        return start(*command, "--name", name, *extra, **options)

    return run


@pytest.fixture(scope="session")
def whole(tmp_path_factory, cache, command):
    """What comes out of the training that nothing interrupts, and the folder of the run."""
    cwd = tmp_path_factory.mktemp("whole")
    process = Command(*command, "--name", "whole", cwd=cwd, cache=cache)
    assert process.end() == 0, process.text
    return cwd / "runs/whole"


@pytest.fixture
def assert_same(whole):
    """Weights, average, optimizer, key and every logged loss of a run, to the last bit."""

    def check(folder):
        got, expected = outcome(folder), outcome(whole)
        assert got.keys() == expected.keys()
        for name, value in expected.items():
            assert got[name] == value, name

    return check


def outcome(folder):
    last = folder / "checkpoints" / f"{STEPS:08d}"
    arrays = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("steps_per_second")
    state = json.loads((last / "state.json").read_text())
    assert len(arrays) == 3 and [line["step"] for line in lines] == [50, 100, 150, 200, STEPS]
    return {**arrays, "metrics": lines, "key": state["key"], "pending": state["pending"]}
