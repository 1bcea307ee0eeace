"""Two trainings: one to be stopped, in a process of its own, and a short one in this process."""

import json
import shutil

import numpy as np
import pytest

from jax_ddpm.cli import run
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint
from jax_ddpm.runs import Settings, fit
from jax_ddpm.runs.model import PICTURES

STEPS = 60
SETTINGS = {"model": "simple", "batch_size": 8, "timesteps": 4}
SETTINGS |= {"steps": STEPS, "checkpoint_every": 10, "log_every": 50}
PREPARATION = {"image_size": 8, "crop": "random"}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in (SETTINGS | PREPARATION).items()]

# Runs the command; in the thread that saves, the COUNT-th call of NAME begins with an action.
INSTEAD = """
import itertools, os, signal, sys, threading, time
name, count, action = sys.argv.pop(1), int(sys.argv.pop(1)), sys.argv.pop(1)
real, calls = getattr(os, name), itertools.count(1)

def call(*arguments):
    if threading.current_thread() is not threading.main_thread() and next(calls) == count:
        eval(action)
    return real(*arguments)

setattr(os, name, call)
from jax_ddpm.__main__ import main
main()
"""

SHORT = "train --data x.npy --model simple --batch-size 4 --timesteps 4"
SHORT += " --steps 6 --checkpoint-every 2 --steps-per-dispatch 4"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "x.npy"
    np.save(path, np.random.default_rng(0).integers(0, 256, (100, 10, 12), np.uint8))
    return path


@pytest.fixture
def train(start, images):
    """Start the training of `runs/cut`: the same command every time. With `call` ("fsync", 3,
    action) the third `os.fsync` of the thread that saves is the one."""

    def run(name="cut", call=None, **options):
        program = ("-c", INSTEAD, *map(str, call)) if call else ("-m", "jax_ddpm")
        command = (*program, "train", *FLAGS, "--flip", f"--data={images}", f"--name={name}")
        return start(*command, **options)

    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, images, defaults):
    """The run of the same training that nothing interrupts, in this process."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    fit(folder, load_dataset(images, Preparation(**PREPARATION, flip=True)), Settings(**SETTINGS))
    return folder


@pytest.fixture
def assert_same(whole):
    """Weights, average, optimizer, key and every logged loss of a run, to the last bit."""

    def outcome(folder):
        last, lines = folder / f"checkpoints/{STEPS:08d}", (folder / "metrics.jsonl").read_text()
        arrays = {path.name: path.read_bytes() for path in last.glob("*.safetensors")}
        lines = [json.loads(line) | {"steps_per_second": 0} for line in lines.splitlines()]
        assert len(arrays) == 3 and [line["step"] for line in lines] == [50, STEPS]
        state = json.loads((last / "state.json").read_text())
        return {**arrays, "metrics": lines, "key": state["key"], "pending": state["pending"]}

    def check(folder):
        got, expected = outcome(folder), outcome(whole)
        assert [name for name in expected if got[name] != expected[name]] == []

    return check


@pytest.fixture(scope="module", autouse=True)
def quick_pictures():
    """Drawing takes as long as a short training, and has tests of its own."""
    touch = lambda folder, *_, **__: [(folder / name).touch() for name in PICTURES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_ddpm.cli.train.save_pictures", touch)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, defaults, quick_pictures):
    """A folder with a few images, and `runs/x` that was trained on them. Only to be read."""
    cwd = tmp_path_factory.mktemp("finished")
    images = np.random.default_rng(0).uniform(0, 1, (9, 4, 4))
    np.save(cwd / "x.npy", images.astype(np.float32))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        run(SHORT.split())
    return cwd


@pytest.fixture
def copy(finished, tmp_path):
    return shutil.copytree(finished, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def steps_of():
    """The steps of a run's checkpoints, all of which are intact."""
    paths = lambda folder: list_checkpoints(folder / "checkpoints")
    return lambda folder: [load_checkpoint(path).step for path in paths(folder)]


@pytest.fixture
def data(copy):
    """A folder with the images alone."""
    shutil.rmtree(copy / "runs")
    return copy


@pytest.fixture
def here(jax_ddpm_here, tmp_path, monkeypatch):
    """Run a command in this process, in the test's folder. Checks its exit code, and that its
    output (its errors, where the code is 2) has these words."""
    monkeypatch.setattr("jax_ddpm.cli.doctor._parity", lambda: 0)  # its comparisons take 20 s

    def check(command, *words, code=0):
        result = jax_ddpm_here(*command.split(), cwd=tmp_path)
        said = result.stderr if code == 2 else result.stdout + result.stderr
        assert result.returncode == code, result.stderr
        assert [each for each in words if each not in said] == [], said
        return said

    return check


@pytest.fixture
def short(here):
    """Train for six steps."""
    return lambda *words, flags="", code=0: here(f"{SHORT} {flags}", *words, code=code)
