"""What would spoil a run stops it, in one line, with everything before it intact."""

import errno
import json
import os
import signal
import threading

import numpy as np
import pytest

from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint
from jax_ddpm.runs import fitting

TRAIN = [
    *("train", "--model", "simple", "--batch-size", "4", "--timesteps", "4", "--data", "x.npy"),
    *("--steps", "6", "--checkpoint-every", "2", "--steps-per-dispatch", "1"),
]


# The command with a quota on the size of files, between metrics and weights.
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
from jax_ddpm.__main__ import main
main()
"""


@pytest.fixture
def data(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8))
    return tmp_path


@pytest.fixture
def nan_at_step_4(data, monkeypatch):
    """The fourth step meets an image with a NaN, as a failing disk or preprocessing gives it."""
    np.save(data / "x.npy", np.random.default_rng(0).uniform(0, 1, (9, 4, 4)).astype(np.float32))
    prefetched, seen = fitting.prefetched, []

    def broken(arrays, order, dispatches, sharding):
        batches = prefetched(arrays, order, dispatches, sharding)
        for steps, batch in zip(dispatches, batches, strict=True):
            if len(dispatches) > 1 and steps.start == 3:  # not what is compiled for
                seen.append(order(steps))
                batch = batch | {"images": batch["images"].at[..., 0].set(np.nan)}
            yield batch

    monkeypatch.setattr(fitting, "prefetched", broken)
    return seen


def states(folder):
    return {path.name: load_checkpoint(path) for path in list_checkpoints(folder / "checkpoints")}


def test_a_nan_stops_the_run_and_is_not_saved(jax_ddpm_here, data, nan_at_step_4):
    result = jax_ddpm_here(*TRAIN, cwd=data)
    assert result.returncode == 2
    images = ", ".join(map(str, nan_at_step_4[0][0]))
    assert (
        "step 4: the loss or its gradient is not finite; the last good checkpoint is of step 2; "
        "a lower --learning-rate may help, --on-nan skip drops such steps; the step's images, "
        f"some of which may be at fault: {images}"
    ) in result.stderr
    assert list(states(data / "runs/x")) == ["00000002"]


def test_a_nan_is_dropped_and_counted(jax_ddpm_here, data, nan_at_step_4):
    result = jax_ddpm_here(*TRAIN, "--on-nan", "skip", cwd=data)
    assert result.returncode == 0, result.stderr
    assert "1 of 6 steps dropped: their loss or gradient was not finite" in result.stdout
    (line,) = map(json.loads, (data / "runs/x/metrics.jsonl").read_text().splitlines())
    assert line["dropped"] == 1 and np.isfinite(line["loss"])
    last = states(data / "runs/x")["00000006"]
    # Of six steps the optimizer took five.
    assert last.step == 6 and last.arrays["optimizer"]["1/0/count"] == 5


def test_what_changed_is_named_and_allowed_only_when_told(jax_ddpm_here, data):
    assert jax_ddpm_here(*TRAIN, cwd=data).returncode == 0
    before = {path: path.read_bytes() for path in (data / "runs").rglob("*") if path.is_file()}
    changes = {
        ("--seed", "3"): "--seed: was 0, is 3",
        ("--learning-rate", "1"): "--learning-rate: was 0.002, is 1",
        ("--dtype", "bfloat16"): "--dtype: was float32, is bfloat16",
        ("--batch-size", "3"): "--batch-size: was 4, is 3",
        ("--model", "unet"): "--model: was simple, is unet",
    }
    for flags, words in changes.items():
        result = jax_ddpm_here(*TRAIN, "--steps", "8", *flags, cwd=data)
        assert result.returncode == 2 and words in result.stderr, result.stderr
        assert "--steps: was 6, is 8" in result.stderr
        assert "with --accept-changes in spite of it" in result.stderr
    result = jax_ddpm_here(*TRAIN, "--seed", "3", "--accept-changes", cwd=data)
    assert result.returncode == 2 and "--seed: was 0, is 3" in result.stderr
    assert "x is trained to step 6 already" in result.stderr
    images = np.load(data / "x.npy")
    for changed, words in ((images[:-1], "images were [9, 4, 4, 1], are [8, 4, 4, 1]"),
                           (images ^ 1, "the images or their labels are others")):  # fmt: skip
        np.save(data / "x.npy", changed)
        result = jax_ddpm_here(*TRAIN, cwd=data)
        assert result.returncode == 2 and words in result.stderr
    after = {path: path.read_bytes() for path in (data / "runs").rglob("*") if path.is_file()}
    assert after == before
    result = jax_ddpm_here(*TRAIN, "--steps", "8", "--accept-changes", cwd=data)
    assert result.returncode == 0 and "resuming from step 6" in result.stdout
    assert "accepted: --steps: was 6, is 8; --data: the images" in result.stdout
    assert list(states(data / "runs/x")) == ["00000004", "00000006", "00000008"]
    config = json.loads((data / "runs/x/config.json").read_text())
    assert config["train"]["steps"] == 8
    # What does not fit the weights is refused by its name, whatever is accepted.
    before = {path: path.read_bytes() for path in (data / "runs").rglob("*") if path.is_file()}
    change = ["--steps", "10", "--model", "unet", "--accept-changes"]
    result = jax_ddpm_here(*TRAIN, *change, cwd=data)
    assert result.returncode == 2 and "step 8 is of another network (params: exp" in result.stderr
    after = {path: path.read_bytes() for path in (data / "runs").rglob("*") if path.is_file()}
    assert after == before and data / "runs/x/samples.png" in after


def test_a_finished_run_is_left_alone(jax_ddpm_here, data):
    for expected in ("wrote runs/x/", "trained to step 6 already"):
        result = jax_ddpm_here(*TRAIN, cwd=data)
        assert result.returncode == 0 and expected in result.stdout
        files = {path: path.stat().st_mtime_ns for path in (data / "runs/x").rglob("*.s*")}
        if "wrote" in expected:
            before = files
    assert files == before


def test_a_folder_of_something_else_is_left_alone(jax_ddpm_here, data, write_run):
    from jax_ddpm.models import SimpleUNet

    (data / "runs/x").mkdir(parents=True)
    (data / "runs/x/thesis.txt").write_text("mine")
    result = jax_ddpm_here(*TRAIN, cwd=data)
    assert result.returncode == 2 and "runs/x exists already, and is no run" in result.stderr
    assert [path.name for path in (data / "runs/x").iterdir()] == ["thesis.txt"]
    write_run(data / "runs/converted", SimpleUNet(channels=1))
    result = jax_ddpm_here(*TRAIN, "--name", "converted", cwd=data)
    assert result.returncode == 2 and "`train` did not make it" in result.stderr


def test_two_writers_on_one_run(train, jax_ddpm_here, tmp_path, assert_same):
    first = train().until(lambda command: "device(s)" in command.text).send(signal.SIGSTOP)
    second = train()
    assert second.end() == 2
    words = "runs/cut is being trained by another process: wait for its end, or choose another name"
    assert f"--name: {words}" in second.text
    assert first.send(signal.SIGCONT).end() == 0
    assert_same(tmp_path / "runs/cut")


def test_a_full_disk(train, tmp_path, assert_same):
    """A quota on the size of files: the save fails, what was saved before resumes."""
    folder = tmp_path / "runs/cut/checkpoints"
    command = train().until(lambda command: (folder / "00000020").exists())
    command.process.kill()
    command.end()

    command = train(program=("-c", SMALL_FILES))
    assert command.end() == 2
    newest = list_checkpoints(folder)[-1]
    assert f"--out: cannot write {folder.relative_to(tmp_path)}/000000" in command.text
    words = f"step {int(newest.name)} is saved: the same command resumes from there"
    assert f": File too large; {words}" in command.text
    assert "Traceback" not in command.text
    assert not list(folder.glob(".*.tmp")) and list_checkpoints(folder)
    for path in list_checkpoints(folder):
        load_checkpoint(path)
    assert train().end() == 0
    assert_same(tmp_path / "runs/cut")


def test_a_disk_that_is_full_at_the_first_checkpoint(jax_ddpm_here, data, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if threading.current_thread() is not threading.main_thread():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as full:
        full.setattr(os, "fsync", fsync)
        result = jax_ddpm_here(*TRAIN, cwd=data)
    assert result.returncode == 2
    path = "runs/x/checkpoints/00000002"
    words = f"--out: cannot write {path}: No space left on device; nothing was saved yet"
    assert f"jax-ddpm: {words}\n" in result.stderr
    assert jax_ddpm_here(*TRAIN, cwd=data).returncode == 0


def test_where_nothing_can_be_written(jax_ddpm_here, data):
    result = jax_ddpm_here(*TRAIN, "--out", "/proc", cwd=data)
    assert result.returncode == 2 and "--out: cannot write /proc/x" in result.stderr
