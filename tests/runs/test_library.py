"""Runs from Python: what the commands do, to the same bits."""

import json
import os
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

import jax_ddpm as ddpm
from jax_ddpm import runs
from jax_ddpm.data import Dataset, load_dataset
from jax_ddpm.models import SimpleUNet, ddpm_digits

pytestmark = pytest.mark.usefixtures("defaults", "untyped")

# Trains, resumes and draws; `die` is where the first call of it is killed.
SCRIPT = """
import os, signal, sys
import jax
from jax_ddpm import data, runs

die = int(sys.argv[1])
images = data.load_dataset("x.npy")
settings = runs.Settings(model="simple", steps=6, batch_size=4, timesteps=4, checkpoint_every=2)
kill = lambda here: here.done == die and os.kill(os.getpid(), signal.SIGKILL)
runs.fit("runs/python", images, settings, progress=kill)
run = runs.load_run("runs/python")
samples = runs.draw(jax.random.key(0), run, 3)
runs.save_samples("python.npz", samples)
"""
COMMANDS = """
from jax_ddpm.cli import run

train = "train --data x.npy --model simple --steps 6 --batch-size 4 --timesteps 4"
run([*train.split(), "--checkpoint-every", "2", "--name", "command"])
run("sample --run runs/command --num 3 --out command.npz".split())
"""


@pytest.fixture
def pictures():
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (12, 8, 8, 1)).astype(np.float32)
    return Dataset(images, np.arange(12, dtype=np.int32) % 3)


def assert_equal(got, expected):
    """Two states, to the bit."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        np.testing.assert_array_equal(one, other)


def test_trained_killed_resumed_and_drawn_as_the_command_does(tmp_path):
    assert len(SCRIPT.strip().splitlines()) <= 15
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8))
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}

    def python(code, *arguments):
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
        )

    assert python(SCRIPT, "5").returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "runs/python/checkpoints").glob("0*")]
    for result in (python(SCRIPT, "-1"), python(COMMANDS)):
        assert result.returncode == 0, result.stderr
    for name in ("params", "ema", "optimizer"):
        path = f"checkpoints/00000006/{name}.safetensors"
        ours, theirs = (tmp_path / "runs" / run / path for run in ("python", "command"))
        assert ours.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "python.npz").read_bytes() == (tmp_path / "command.npz").read_bytes()


def test_a_training_stops_and_resumes(tmp_path, pictures):
    settings = runs.Settings(model="simple", steps=4, batch_size=4, timesteps=4)
    seen = []

    def progress(here):
        seen.append((here.done, here.total))

    stopped = runs.fit(
        tmp_path / "run", pictures, settings, progress=progress, stop=lambda: len(seen) == 3
    )
    assert (stopped.step, stopped.stopped) == (2, True)
    assert seen == [(0, 4), (1, 4), (2, 4)]
    end = runs.fit(str(tmp_path / "run"), pictures, settings)
    assert (end.step, end.stopped) == (4, False)
    whole = runs.fit(tmp_path / "whole", pictures, settings)
    assert_equal(end.state, whole.state)
    weights = load_file(tmp_path / "run/checkpoints/00000004/ema.safetensors")
    np.testing.assert_array_equal(
        end.run.pretrained.variables["params"]["down1"]["kernel"], weights["params/down1/kernel"]
    )
    (line,) = runs.read_metrics(tmp_path / "run/metrics.jsonl")
    assert line["step"] == 4 and np.isfinite(line["loss"])


def test_what_is_wrong_is_named_as_python_spells_it(tmp_path, pictures, write_run):
    """By the setting; the command line's tests are of the same messages with flags."""
    settings = runs.Settings(model="simple", steps=2, batch_size=4, timesteps=4)
    runs.fit(tmp_path / "run", pictures, settings)
    changed = runs.Settings(model="simple", steps=4, batch_size=4, timesteps=4, seed=1)
    run = write_run(tmp_path / "digits", ddpm_digits(block_out_channels=(8, 8)), num_classes=10)
    chain = run.pretrained.schedule
    key, ints = jax.random.key(0), np.zeros((9, 8, 8, 1), np.int32)
    for call, words in (
        (lambda: runs.Settings(keep_every=150), "keep_every: expected a multiple of checkpoint_e"),
        (lambda: runs.fit(tmp_path / "run", pictures, changed), "with accept_changes=True in"),
        (lambda: runs.fit(tmp_path / "x", pictures), "batch_size: expected at most 12"),
        (lambda: runs.Settings(schedule="x"), "schedule: expected one of 'linear', 'scaled_linear"),
        (
            lambda: runs.fit(tmp_path / "x", pictures._replace(images=ints)),
            r"data: expected uint8 or float32 images .*, got int32\[9",
        ),
        (
            lambda: runs.fit(tmp_path / "x", pictures._replace(labels=np.zeros(3, np.int32))),
            r"data: expected int32 labels .12., one for each image, got int32",
        ),
        (
            lambda: runs.fit(tmp_path / "x", pictures._replace(images=pictures.images * 2)),
            "data: expected pixels in",
        ),
        (lambda: runs.load_run(tmp_path / "nowhere"), "folder: expected a run's folder, got"),
        (lambda: runs.load_run(tmp_path / "run", checkpoint=1), "checkpoint: expected one of 2"),
        (lambda: runs.load_run(tmp_path / "run/checkpoints"), "folder: expected a run's folder"),
        (lambda: runs.draw(key, run, 2, labels=10), "labels: expected 0 to 9, got 10"),
        (lambda: runs.draw(key, run, 2, labels=[0.5]), "labels: expected whole numbers"),
        (lambda: runs.draw(key, run, 2, steps=21), "steps: expected at most 20"),
        (lambda: runs.draw(key, run, 0), "num: expected more than 0, got 0"),
        (lambda: runs.draw(key, run, 2, labels=[[1]]), "labels: expected whole numbers"),
        (lambda: runs.draw(key, run, 2, steps=2, chain=chain), "steps: cannot be given with chain"),
        (lambda: runs.Settings(steps=10.5), "steps: expected a whole number, got 10.5"),
        (lambda: runs.Settings(learning_rate=np.inf), "learning_rate: expected a finite number"),
        (lambda: runs.Settings(grad_clip=None), "grad_clip: expected a finite number, got None"),
        (lambda: runs.Settings(remat="no"), "remat: expected True or False, got 'no'"),
        (lambda: runs.fit(tmp_path / "x", "digits"), "data: expected a Dataset, such as load_data"),
        (lambda: runs.load_run(tmp_path / "run", weights="EMA"), "weights: expected one of 'ema'"),
        (lambda: runs.load_pretrained(tmp_path / "run"), "is a run, for load_run, and no folder"),
        (lambda: runs.export(tmp_path / "x", run, platforms="cpu"), "platforms: expected a list"),
        (lambda: runs.export(tmp_path / "x", run, platforms=["gpu"]), "platforms: expected one of"),
        (lambda: runs.evaluate(run, pictures), "data: too few images for 3 classes"),
        (lambda: load_dataset("nowhere"), "data: no such file or folder: nowhere"),
    ):  # fmt: skip
        with pytest.raises(runs.FieldError, match=words):
            call()
    assert not (tmp_path / "x").exists()
    assert runs.Settings(steps=np.int64(4)).record()["steps"] == 4
    with pytest.raises(TypeError, match="key: expected a typed key"):
        runs.draw(0, run, 2)


def test_a_whole_state_is_saved_and_restored(tmp_path):
    model, optimizer = SimpleUNet(channels=1), optax.adam(1e-3)
    x, t = np.zeros((2, 8, 8, 1), np.float32), np.zeros(2, np.int32)
    variables = jax.jit(model.init)(jax.random.key(0), x, t)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(10))
    step = jax.jit(ddpm.make_train_step(schedule, model.apply, optimizer))
    state, _ = step(ddpm.init_train_state(jax.random.key(1), variables, optimizer), x)
    path = runs.save_state(tmp_path / "mine", state)
    assert path == tmp_path / "mine/00000001"
    back = runs.load_state(path, like=jax.eval_shape(lambda: state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    assert_equal(step(back, x)[0], step(state, x)[0])
    with pytest.raises(
        ValueError, match="mine: expected one checkpoint, got a folder of several: 0"
    ):
        runs.load_state(tmp_path / "mine", like=state)
    with pytest.raises(ValueError, match="params: expected an array x, got none"):
        runs.load_state(path, like=state._replace(params={**state.params, "x": 1}))


def test_a_run_written_before_is_still_read(tmp_path, pictures):
    """Its settings lay among the command's own: its name, its folder, its devices."""
    settings = runs.Settings(model="simple", steps=2, batch_size=4, timesteps=4)
    runs.fit(tmp_path / "run", pictures, settings)
    path = tmp_path / "run/config.json"
    recorded = json.loads(path.read_text())
    older = {"name": None, "out": "runs", "dataset": "digits", "accept_changes": False}
    recorded["train"] |= {**older, "data": "x.npy", "devices": {"coordinator": None}}
    del recorded["train"]["keep_every"], recorded["data"]["source"]
    from jax_ddpm.io.checkpoint import load_checkpoint, save_checkpoint

    checkpoint = load_checkpoint(tmp_path / "run/checkpoints/00000002")
    state = {**checkpoint.state, "run": recorded}
    save_checkpoint(tmp_path / "run/checkpoints", 2, checkpoint.arrays, state)
    assert runs.load_run(tmp_path / "run").image_shape == (8, 8, 1)
    assert runs.fit(tmp_path / "run", pictures, settings).step == 2
