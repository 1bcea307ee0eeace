"""Every damaged file is named in one line; training falls back, sampling refuses."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from jax_ddpm.cli import doctor
from jax_ddpm.io.checkpoint import list_checkpoints
from jax_ddpm.runs import load_run

FILES = ("state.json", "manifest.json")
FILES += ("params.safetensors", "ema.safetensors", "optimizer.safetensors")
KINDS = ("flipped", "truncated", "empty", "missing")
# Every file and every kind once; in the second circle, each with each.
DAMAGES = [
    pytest.param(name, kind, marks=() if place % 4 == KINDS.index(kind) else pytest.mark.slow)
    for place, name in enumerate(FILES)
    for kind in KINDS
]
FOLDER = "runs/x/checkpoints/0000000"
LAST = f"{FOLDER}6/ema.safetensors"
SAMPLE = "sample --run runs/x --num 2 --out x.npz"


def damage(path, kind="flipped"):
    content = bytearray(path.read_bytes())
    path.unlink()
    content[len(content) // 2] ^= 4 if kind == "flipped" else 0
    if kind != "missing":
        path.write_bytes({"truncated": content[:-1], "empty": b""}.get(kind, content))


@pytest.fixture
def here(jax_ddpm_here, monkeypatch, copy):
    """A command beside a finished run. The doctor makes no comparisons, which take 20 s."""
    monkeypatch.setattr(doctor, "_parity", lambda: 0)
    return lambda command: jax_ddpm_here(*command.split(), cwd=copy)


@pytest.mark.parametrize(("name", "kind"), DAMAGES)
def test_a_damaged_checkpoint_is_not_drawn_from(here, copy, name, kind):
    """Also where the damage is not in the weights that it draws from."""
    damage(copy / f"{FOLDER}6" / name, kind)
    result = here(SAMPLE)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"--run: {FOLDER}6/{name}: " in result.stderr
    assert "; the one before: --checkpoint 4\n" in result.stderr
    assert not (copy / "x.npz").exists()


def test_the_checkpoint_before_a_damaged_one_is_named_and_can_be_read(here, copy):
    convert = "convert {} y --to run"
    init = "train --data x.npy --batch-size 4 --name on --init {}"

    def refused(command, words):
        result = here(command)
        assert result.returncode == 2 and f"{words}\n" in result.stderr, command

    for step in (4, 6):
        damage(copy / f"{FOLDER}{step}/ema.safetensors")
    refused(f"{SAMPLE} --checkpoint 6", "; the one before: --checkpoint 4")
    refused(f"{SAMPLE} --checkpoint 4", "; the one before: --checkpoint 2")
    refused(convert.format("runs/x"), f"; the one before: {FOLDER}4")
    refused(init.format("runs/x"), f"; the one before: {FOLDER}4")
    refused(init.format(f"{FOLDER}4"), f"; the one before: {FOLDER}2")
    words = "--checkpoint: expected one of 2, 4, 6 in runs/x, got 5"
    refused(f"{SAMPLE} --checkpoint 5", words)

    assert here(f"{SAMPLE} --checkpoint 2").returncode == 0
    assert np.load(copy / "x.npz")["samples"].shape == (2, 4, 4, 1)
    assert here(convert.format(f"{FOLDER}2")).returncode == 0
    weights = [copy / run / "ema.safetensors" for run in (f"{FOLDER}2", "y/checkpoints/00000000")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    damage(weights[0])
    for command in (convert, init):
        refused(command.format(f"{FOLDER}2"), "; there is no older one")


SLOW_WRITES = (
    "sample --run runs/x --steps 1 --num 2 --out x.png",
    "export --run runs/x --steps 1 --platforms cpu --out x.jaxexport",
    "evaluate --run runs/x --steps 1 --num 2 --data x.npy --json x.json",
)


@pytest.mark.parametrize(
    "command",
    [
        SAMPLE,
        "convert --to run runs/x OUT y",
        "convert --to torch runs/x OUT y.safetensors",
        *(pytest.param(command, marks=pytest.mark.slow) for command in SLOW_WRITES),
    ],
)
def test_a_write_that_fails_is_named_and_leaves_nothing(here, copy, monkeypatch, command):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(copy.rglob("*"))
    monkeypatch.setattr(os, "fsync", fsync)
    *_, flag, out = command.split()
    result = here(command.replace("OUT", ""))
    assert result.returncode == 2
    assert f"jax-ddpm: {flag}: cannot write {out}: No space left on device\n" in result.stderr
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize(
    "name", [FILES[0], *(pytest.param(name, marks=pytest.mark.slow) for name in FILES[1:])]
)
def test_training_falls_back_to_the_last_good_one(short, copy, finished, name):
    for step in (4, 6):
        damage(copy / f"{FOLDER}{step}" / name)
    result = short()
    assert result.returncode == 0, result.stderr
    for step in (4, 6):
        assert f"{FOLDER}{step}/{name}: damaged" in result.stdout
        assert f"set aside as .{step:08d}.damaged\n" in result.stdout
    assert (copy / LAST).read_bytes() == (finished / LAST).read_bytes()


def test_without_a_good_one_nothing_is_thrown_away(short, copy):
    for path in list_checkpoints(copy / "runs/x/checkpoints"):
        damage(path / "params.safetensors")
    before = sorted((copy / "runs/x").rglob("*"))
    result = short()
    assert result.returncode == 2 and "no checkpoint is intact: runs/x/checkpoints" in result.stderr
    assert sorted((copy / "runs/x").rglob("*")) == before


def test_a_run_that_never_reached_a_checkpoint_begins_again(short, here, copy, finished):
    shutil.rmtree(copy / "runs/x/checkpoints")
    result = here(SAMPLE)
    assert result.returncode == 2 and "expected a run's folder" in result.stderr
    assert short().returncode == 0
    assert (copy / LAST).read_bytes() == (finished / LAST).read_bytes()
    shutil.rmtree(copy / "runs/x/checkpoints")
    (copy / "runs/x/config.json").write_text('{"model": ')
    result = short()
    assert result.returncode == 2 and "runs/x/config.json: expected JSON" in result.stderr


def test_a_flipped_setting_in_config_json_misleads_nobody(copy):
    """The checkpoint's own copy is what counts, and it is under its digest."""
    config = json.loads((copy / "runs/x/config.json").read_text())
    config["scheduler"]["prediction_type"] = "sample"
    (copy / "runs/x/config.json").write_text(json.dumps(config))
    assert load_run(copy / "runs/x").pretrained.prediction_type == "epsilon"


def test_the_doctor_says_which_comparison_fails(diffusers, jax_ddpm_here, copy, monkeypatch):
    from jax_ddpm.parity import Case

    x = np.ones(3)
    cases = [Case("maths", f"{k} x", lambda _, k=k: (k * x, x)) for k in (1, 2)]
    monkeypatch.setattr("jax_ddpm.parity.CASES", cases)
    result = jax_ddpm_here("doctor", cwd=copy)
    assert result.returncode == 1 and "2 of 4 comparisons with PyTorch hold" in result.stdout
    assert "FAILED: 2 x, float64: 1.0e+00" in result.stdout


def test_the_doctor_checks_what_was_exported(here, copy):
    assert here("export --run runs/x --steps 1 --out x.jaxexport").returncode == 0
    result = here("doctor --export x.jaxexport")
    assert result.returncode == 0 and "x.jaxexport: intact" in result.stdout
    damage(copy / "x.jaxexport")
    result = here("doctor --export x.jaxexport")
    assert result.returncode == 1 and "x.jaxexport: WRONG: its SHA-256" in result.stdout
    (copy / "x.jaxexport.json").write_text("{")
    result = here("doctor --export x.jaxexport")
    assert result.returncode == 1 and "x.jaxexport.json: expected JSON" in result.stdout


@pytest.mark.parametrize("kind", ["flipped", "missing"])
def test_the_doctor_finds_it(here, copy, kind):
    result = here("doctor --run runs/x")
    assert result.returncode == 0 and "nothing is wrong" in result.stdout
    assert result.stdout.count(" intact") == 3
    damage(copy / f"{FOLDER}4/optimizer.safetensors", kind)
    (copy / "runs/x/config.json").write_text('{"model": ')
    result = here("doctor --run runs/x")
    assert result.returncode == 1 and "2 thing(s) wrong" in result.stdout
    assert f"WRONG: {FOLDER}4/optimizer.safetensors: damaged" in result.stdout
    assert "WRONG: runs/x/config.json" in result.stdout
    assert "the newest checkpoint is intact: remove those that are not" in result.stdout


def test_what_the_doctor_advises_mends_it(short, here, copy):
    """Training again, of a run that had ended and of one that resumes from before the damage."""
    config = (copy / "runs/x/config.json").read_bytes()
    words = "sets aside what is damaged and resumes from step 4; until then, sample and others take"
    for resumes in (False, True):
        (copy / "runs/x/config.json").write_text('{"model": ')
        with (copy / "runs/x/metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo\n')
        if resumes:
            (copy / "runs/x/config.json").unlink()
            damage(copy / LAST)
        said = here("doctor --run runs/x").stdout
        assert "config.json: expected" in said and "; the same training command mends it" in said
        assert "metrics.jsonl: 1 line(s) damaged; the same training command drops them" in said
        assert (f"{words} --checkpoint 4" in said) == resumes
        result = short()
        assert result.returncode == 0 and ("resuming from step 4" in result.stdout) == resumes
        assert here("doctor --run runs/x").returncode == 0
        assert (copy / "runs/x/config.json").read_bytes() == config
    for path in list_checkpoints(copy / "runs/x/checkpoints"):
        damage(path / "ema.safetensors")
    assert "no checkpoint is intact: train or convert anew" in here("doctor --run runs/x").stdout
