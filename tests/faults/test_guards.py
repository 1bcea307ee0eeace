"""What would spoil a run stops it, in one line, with everything before it intact."""

import errno
import itertools
import json
import os
import shutil
import sys
import threading
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest

from jax_ddpm.data import load_dataset
from jax_ddpm.io.checkpoint import load_checkpoint, save_checkpoint
from jax_ddpm.models import SimpleUNet
from jax_ddpm.runs import FieldError, Settings, fit, training


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture
def nan_at_step_4(data, monkeypatch):
    """The fourth step meets an image with a NaN, as a failing disk or preprocessing gives it."""
    prefetched, seen = training.prefetched, []

    def broken(arrays, order, dispatches, sharding):
        batches = prefetched(arrays, order, dispatches, sharding)
        for steps, batch in zip(dispatches, batches, strict=True):
            if 3 in steps:
                seen.extend(order(range(3, 4))[0])
                batch = batch | {"images": batch["images"].at[1].set(np.nan)}
            yield batch

    monkeypatch.setattr(training, "prefetched", broken)
    return seen


def test_a_nan_stops_the_run_or_is_dropped_and_counted(steps_of, short, data, nan_at_step_4):
    words = "step 4: the loss or its gradient is not finite; the last good checkpoint is of step 2"
    said = short(words, "--on-nan skip drops such steps", code=2)
    assert f"may be at fault: {', '.join(map(str, nan_at_step_4))}" in said
    assert steps_of(data / "runs/x") == [2]
    short("1 of 6 steps dropped: their loss or gradient", flags="--on-nan skip")
    lines = map(json.loads, (data / "runs/x/metrics.jsonl").read_text().splitlines())
    assert [line.get("dropped") for line in lines] == [None, 1, None]
    last = load_checkpoint(data / "runs/x/checkpoints/00000006")
    # Of six steps the optimizer took five.
    assert (last.step, last.arrays["optimizer"]["1/0/count"]) == (6, 5)


@pytest.mark.filterwarnings("default:accepted|step 6 was trained")
def test_what_changed_is_named_and_allowed_only_when_told(steps_of, short, copy):
    before, images = contents(copy / "runs/x/checkpoints"), np.load(copy / "x.npy")
    short("trained to step 6 already")
    assert contents(copy / "runs/x/checkpoints") == before
    before = contents(copy / "runs")

    def refused(flags, *words, images=images):
        np.save(copy / "x.npy", images)
        short(*words, flags=flags, code=2)
        assert contents(copy / "runs") == before

    words = ["--dtype: was float32, is bfloat16; --learning-rate: was 0.002, is 1.0; --flip: was "]
    words += ["another --name begins beside it, --overwrite in its place, --accept-changes resumes"]
    refused("--steps 8 --learning-rate 1 --dtype bfloat16 --flip", *words)
    words = "--seed: was 0, is 3", "x is trained to step 6", "resumes it all the same to a "
    refused("--seed 3 --accept-changes", *words)
    refused("--steps 5", "--steps: was 6, is 5")
    refused("", "--data: was [9, 4, 4, 1], ", "is [8, 4, 4, 1], ", images=images[:-1])
    refused("", "--data: was [9, 4, 4, 1], classes None, SHA-256 ", images=1 - images)

    words = ["resuming from step 6", "2 steps a dispatch, jax", "not to the bit"]
    words += ["accepted: data: was [9"]
    short(*words, flags="--steps 8 --accept-changes --steps-per-dispatch 2")
    assert steps_of(copy / "runs/x") == [4, 6, 8]
    assert json.loads((copy / "runs/x/config.json").read_text())["train"]["steps"] == 8
    # What does not fit the weights is refused, whatever is accepted, and not advised.
    before, colours = contents(copy / "runs"), images[..., None].repeat(3, axis=-1)
    words = "the weights of runs/x are of another network; another --name begins beside it, "
    refused("--steps 10 --accept-changes", f"{words}--overwrite in its place\n", images=colours)


@pytest.mark.slow
@pytest.mark.filterwarnings("default:accepted")
def test_after_a_trial_every_way_that_is_named_leads_on(short, copy, finished):
    """A longer training only resumes; what was overwritten is as if it had never been."""
    short(flags="--steps 3 --name trial")
    short("resuming from step 3", flags="--name trial")
    np.save(copy / "y.npy", np.load(copy / "x.npy")[..., None].repeat(3, axis=-1))
    ways, named = ("--name other", "--overwrite", "--accept-changes --steps 9"), []
    weights_fit = ["--seed 5 --steps 8", "--seed 5"]
    for flags in (*weights_fit, "--data y.npy --name x"):
        for way in ways:
            shutil.rmtree(copy / "runs")
            shutil.copytree(finished / "runs", copy / "runs")
            if way.split()[0] in short(flags=flags, code=2):
                named.append((flags, way))
                short("wrote runs/", flags=f"{flags} {way}")
    assert named[:6] == [*itertools.product(weights_fit, ways)] and len(named) == 8
    short(flags="--seed 5 --name fresh")
    short(flags="--seed 5 --overwrite")
    short("trained to step 6 already", flags="--seed 5 --overwrite")  # the same command resumes
    last = "checkpoints/00000006/params.safetensors"
    assert (copy / "runs/x" / last).read_bytes() == (copy / "runs/fresh" / last).read_bytes()
    assert not list((copy / "runs/x").glob(".over*"))


def test_another_checkpoint_is_named(short, copy):
    """One that lacks a setting, as an older version wrote it, and two of another network."""
    step, arrays, state = load_checkpoint(copy / "runs/x/checkpoints/00000006")

    def saved(**others):
        save_checkpoint(copy / "runs/x/checkpoints", step, arrays | others, state)

    del state["run"]["train"]["optimizer"]
    saved()
    short("trained to step 6 already")
    short("--optimizer: was adam, is adamw; ", flags="--steps 8 --optimizer adamw", code=2)
    saved(ema={})
    words = "the checkpoint of step 6 is of another model: ema: params/"
    short(words, flags="--steps 8", code=2)
    saved(params={name: x[..., :1] for name, x in arrays["params"].items()})
    short("jax-ddpm: the weights of runs/x are of another network; another --name", code=2)
    short("wrote runs/x", flags="--overwrite")


def test_a_run_is_not_overwritten_by_what_starts_from_it(copy):
    before, images = contents(copy / "runs/x"), load_dataset(copy / "x.npy")
    settings = Settings(init=copy / "runs/x/checkpoints/00000004", batch_size=4, steps=6)
    for both, words in ((False, "^init: .*/00000004 would be overwri"), (True, "^expected one of")):
        with pytest.raises(FieldError, match=words):
            fit(copy / "runs/x", images, settings, overwrite=True, accept_changes=both)
    assert contents(copy / "runs/x") == before


def test_what_is_refused_removes_nothing(short, copy, monkeypatch):
    """A tracker that is not there, with a run of other images to be written over, and with none."""
    monkeypatch.setitem(sys.modules, "wandb", Mock(**{"init.side_effect": ValueError("no key")}))
    np.save(copy / "y.npy", 1 - np.load(copy / "x.npy"))
    for name in ("runs/x/samples/00000006.png", "runs/x/training.gif"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).touch()
    before = contents(copy / "runs")
    flags = "--data y.npy --name x --overwrite --tracker wandb"
    short("--tracker: wandb: no key", flags=flags, code=2)
    assert contents(copy / "runs") == before
    short("wandb: no key", flags="--name new --tracker tensorboard wandb", code=2)
    short("wrote runs/new", flags="--name new")


def test_a_folder_of_something_else_is_left_alone(short, data, write_run):
    (data / "runs/x").mkdir(parents=True)
    (data / "runs/x/thesis.txt").write_text("mine")
    short("runs/x exists already, and is no run", code=2)
    assert [path.name for path in (data / "runs/x").iterdir()] == ["thesis.txt"]
    write_run(data / "runs/converted", SimpleUNet(channels=1))
    for name in ("converted", "foreign"):  # the other of a library that writes the same names
        (data / "runs/foreign/checkpoints").mkdir(parents=True, exist_ok=True)
        (data / "runs/foreign/checkpoints/epoch=3.ckpt").write_bytes(b"weights")
        short("`train` did not make it", flags=f"--name {name}", code=2)
    assert (data / "runs/foreign/checkpoints/epoch=3.ckpt").exists()


def test_two_writers_on_one_run(steps_of, short, data):
    """While it trains, the command is refused: the lock is of a file that was opened once."""
    settings = Settings(model="simple", batch_size=4, timesteps=4, steps=6, checkpoint_every=2)
    words = "--name: runs/x is being trained by another process: wait, or choose an"
    images, tries = load_dataset(data / "x.npy"), []
    try_once = lambda _: tries or tries.append(short(words, code=2))
    fit(data / "runs/x", images, settings, progress=try_once)
    assert tries and steps_of(data / "runs/x") == [2, 4, 6]


def test_a_full_disk(steps_of, short, data, finished, monkeypatch):
    """At the first checkpoint, which takes seven calls, or at the second."""
    real, room = os.fsync, []

    def fsync(descriptor):
        if threading.current_thread() is not threading.main_thread():
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            room.pop()
        real(descriptor)

    for calls, step, then in ((0, 2, "nothing was saved yet"), (7, 4, "step 2 is saved: ")):
        room[:] = range(calls)
        with monkeypatch.context() as full:
            full.setattr(os, "fsync", fsync)
            words = f"--out: cannot write runs/x/checkpoints/0000000{step}: No space left on device"
            short(f"jax-ddpm: {words}; {then}", code=2)
        assert steps_of(data / "runs/x") == list(range(2, step, 2))
        assert not list((data / "runs/x/checkpoints").glob(".*"))
    short()
    last = "runs/x/checkpoints/00000006/ema.safetensors"
    assert (data / last).read_bytes() == (finished / last).read_bytes()


@pytest.mark.filterwarnings("default:the optimizer is another", "default:accepted")
def test_another_optimizer_starts_anew_from_the_weights(short, copy):
    """At a rate that changes nothing. Adam counts from 0, the rate's schedule goes on."""
    flags = "--steps 8 --learning-rate 1e-30 --optimizer adamw --weight-decay 0.1 --grad-clip 0"
    short("--grad-clip: was 1.0, is 0", flags=flags, code=2)
    short("another: the weights stay, and it starts", flags=f"{flags} --accept-changes")
    old, new = (load_checkpoint(copy / f"runs/x/checkpoints/0000000{k}").arrays for k in (6, 8))
    for name, weights in old["params"].items():
        np.testing.assert_array_equal(new["params"][name], weights)
        before, after = (np.abs(each["ema"][name] - weights).max() for each in (old, new))
        assert 0 < after < before
    assert [int(new["optimizer"][name]) for name in ("0/count", "2/count")] == [2, 8]
    assert "another:" not in short(flags=f"{flags} --steps 9 --accept-changes")


def test_classes_that_changed_are_named(copy, one_level):
    data = replace(load_dataset(copy / "x.npy"), labels=np.arange(9, dtype=np.int32) % 3)
    settings = Settings(unet=one_level, batch_size=4, timesteps=4, steps=2)
    fit(copy / "named", replace(data, class_names=("ant", "bee", "cat")), settings)
    other = replace(settings, unet={**one_level, "dropout": 0.5})
    with pytest.raises(ValueError, match=r"^unet.dropout: was None, is 0.5; \S* is trained"):
        fit(copy / "named", replace(data, class_names=("ant", "bee", "cat")), other)
    fewer = replace(data, labels=data.labels % 2, class_names=("bee", "cat"))
    for others in (fewer, replace(data, class_names=("bee", "ant", "cat"))):
        with pytest.raises(ValueError, match=r"^data: was .* classes \['ant', .*, is .* \['bee"):
            fit(copy / "named", others, replace(settings, steps=3))
