"""Every damaged file is named in one line; training falls back, sampling refuses."""

import errno
import json
import os
import shutil
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest

from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from jax_ddpm.runs import load_run

FOLDER = "runs/x/checkpoints/0000000"
LAST = f"{FOLDER}6/ema.safetensors"
SAMPLE = "sample --run runs/x --num 2 --out x.npz"


def damage(path):
    """Flip a bit."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def test_the_checkpoint_before_a_damaged_one_is_named_and_can_be_read(here, copy):
    """Also where the damage is not in the weights that are drawn from."""
    convert = "convert {} y --to run"
    init = "train --data x.npy --batch-size 4 --name on --init {}"
    refused, file = partial(here, code=2), f"{FOLDER}6/optimizer.safetensors"
    damage(copy / file)
    said = refused(SAMPLE, f"--run: {file}: ", f"; the one before: {FOLDER}4\n")
    assert len(said.splitlines()) == 1 and not (copy / "x.npz").exists()
    damage(copy / f"{FOLDER}4/ema.safetensors")
    refused(f"{SAMPLE} --checkpoint 4", f"; the one before: {FOLDER}2\n")
    refused(f"{SAMPLE} --checkpoint 5", "--checkpoint: expected one of 2, 4, 6 in runs/x, got 5\n")
    refused(convert.format("runs/x"), f"; the one before: {FOLDER}4\n")
    refused(init.format("runs/x"), f"; the one before: {FOLDER}4\n")
    refused(init.format(f"{FOLDER}4"), f"; the one before: {FOLDER}2\n")

    here(f"{SAMPLE} --checkpoint 2")
    assert np.load(copy / "x.npz")["samples"].shape == (2, 4, 4, 1)
    here(convert.format(f"{FOLDER}2"))
    weights = [copy / run / "ema.safetensors" for run in (f"{FOLDER}2", "y/checkpoints/00000000")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    damage(weights[0])
    for command in (convert, init):
        refused(command.format(f"{FOLDER}2"), "; there is no older one\n")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda arrays, state: state.update(run="mine"), "TypeError"),
        (lambda arrays, state: state["run"].pop("preparation"), "KeyError.*'preparation'"),
        (lambda arrays, state: arrays.pop("ema"), "KeyError.*'ema'"),
        (lambda arrays, state: arrays["ema"].popitem(), "ValueError.*got no array"),
    ],
)
def test_a_checkpoint_of_something_else_is_named(copy, change, why):
    """Whole, but not a run's, or not of the network that it names."""
    _, arrays, state = load_checkpoint(copy / f"{FOLDER}6")
    change(arrays, state)
    save_checkpoint(copy / "runs/x/checkpoints", 8, arrays, state)
    words = f"folder: .*0008: expected a run's checkpoint: {why}.*; the one before: .*0006$"
    with pytest.raises(ValueError, match=words):
        load_run(copy / "runs/x")


def test_a_write_that_fails_is_named_and_leaves_nothing(here, copy, monkeypatch):
    before = sorted(copy.rglob("*"))
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=full))
    for command in (
        SAMPLE,
        "sample --run runs/x --num 2 --out y",
        "convert --to run runs/x OUT y",
        "convert --to torch runs/x OUT y.safetensors",
        "export --run runs/x --steps 1 --platforms cpu --out x.jaxexport",
    ):
        *_, flag, out = command.split()
        words = f"jax-ddpm: {flag}: cannot write {out}: No space left on device\n"
        here(command.replace("OUT", ""), words, code=2)
        assert sorted(copy.rglob("*")) == before


@pytest.mark.filterwarnings("default:.* set aside as")
def test_training_falls_back_to_the_last_good_one(short, copy, finished):
    words = []
    for step, name in ((4, "state.json"), (6, "params.safetensors")):
        damage(copy / f"{FOLDER}{step}/{name}")
        words += [f"{FOLDER}{step}/{name}: damaged", f"set aside as .{step:08d}.damaged\n"]
    short(*words)
    assert (copy / LAST).read_bytes() == (finished / LAST).read_bytes()


def test_without_a_good_one_nothing_is_thrown_away(short, here, copy):
    for path in list_checkpoints(copy / "runs/x/checkpoints"):
        damage(path / "params.safetensors")
    before = sorted((copy / "runs/x").rglob("*"))
    short("no checkpoint is intact: runs/x/checkpoints", code=2)
    here("doctor --run runs/x", "no checkpoint is intact: train or convert anew", code=1)
    assert sorted((copy / "runs/x").rglob("*")) == before


def test_a_run_that_never_reached_a_checkpoint_begins_again(short, here, copy):
    """As after a command that failed while it compiled; the corrected one is not refused."""
    shutil.rmtree(copy / "runs/x/checkpoints")
    (copy / "runs/x/config.json").write_text('{"model": ')
    here(SAMPLE, "expected a run's folder", code=2)
    short(flags="--seed 3")
    assert json.loads((copy / "runs/x/config.json").read_text())["train"]["seed"] == 3


def test_a_flipped_setting_in_config_json_misleads_nobody(copy):
    """The checkpoint's own copy is what counts, and it is under its digest."""
    config = json.loads((copy / "runs/x/config.json").read_text())
    config["scheduler"]["prediction_type"] = "sample"
    (copy / "runs/x/config.json").write_text(json.dumps(config))
    assert load_run(copy / "runs/x").prediction_type == "epsilon"


def test_the_doctor_says_which_comparison_fails(diffusers, jax_ddpm_here, copy, monkeypatch):
    from jax_ddpm.parity import Case

    x = np.ones(3)
    cases = [Case("maths", f"{k} x", lambda _, k=k: (k * x, x)) for k in (1, 2)]
    monkeypatch.setattr("jax_ddpm.parity.CASES", cases)
    result = jax_ddpm_here("doctor", cwd=copy)
    assert result.returncode == 1 and "2 of 4 comparisons with PyTorch hold" in result.stdout
    assert "FAILED: 2 x, float64: 1.0e+00" in result.stdout


def test_the_doctor_finds_what_is_damaged(here, copy):
    """In a run, and in what was exported from it."""
    here("export --run runs/x --steps 1 --out x.jaxexport")
    look = "doctor --run runs/x --export x.jaxexport"
    intact = (f"step {step} intact" for step in (2, 4, 6))
    here(look, *intact, "x.jaxexport: intact", "no problem found")
    damage(copy / f"{FOLDER}4/optimizer.safetensors")
    damage(copy / "x.jaxexport")
    (copy / "runs/x/config.json").write_text('{"model": ')
    wrong = [f"WRONG: {FOLDER}4/optimizer.safetensors: damaged", "WRONG: runs/x/config.json"]
    wrong += ["x.jaxexport: WRONG: its SHA-256", "3 problems found"]
    here(look, *wrong, "the newest checkpoint is intact: remove the damaged ones", code=1)
    (copy / "x.jaxexport.json").write_text("{")
    here(look, "x.jaxexport.json: expected a JSON file", code=1)


@pytest.mark.filterwarnings("default:.* set aside as")
@pytest.mark.parametrize("resumes", [False, True])
def test_the_training_that_the_doctor_advises_mends_the_run(short, here, copy, resumes):
    """One that had ended, and one that resumes from before the damage."""
    config = copy / "runs/x/config.json"
    whole = json.loads(config.read_text())
    config.write_text('{"model": ')
    with (copy / "runs/x/metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo\n')
    advice = ["config.json: expected", "; the same training command mends it"]
    advice += ["metrics.jsonl: 1 line(s) damaged; the same training command drops them"]
    if resumes:
        config.unlink()
        damage(copy / LAST)
        advice += [
            "sets the damaged checkpoints aside and resumes from step 4; until then, give --ch"
        ]
    here("doctor --run runs/x", *advice, code=1)
    assert ("resuming from step 4" in short()) == resumes
    here("doctor --run runs/x")
    # Its images are now elsewhere.
    assert json.loads(config.read_text()) | {"data": None} == whole | {"data": None}
