"""Every damaged file is named in one line; training falls back, sampling refuses."""

import errno
import json
import os
import shutil

import numpy as np
import pytest

from jax_ddpm.io.checkpoint import list_checkpoints

TRAIN = [
    *("train", "--model", "simple", "--batch-size", "4", "--timesteps", "4", "--data", "x.npy"),
    *("--steps", "6", "--checkpoint-every", "2"),
]
FILES = (
    "ema.safetensors",
    "manifest.json",
    "optimizer.safetensors",
    "params.safetensors",
    "state.json",
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, defaults):
    """A short run."""
    from jax_ddpm.cli import run

    cwd = tmp_path_factory.mktemp("finished")
    np.save(cwd / "x.npy", np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8))
    before = os.getcwd()
    os.chdir(cwd)
    try:
        run(TRAIN)
    finally:
        os.chdir(before)
    return cwd


@pytest.fixture
def copy(finished, tmp_path):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    return tmp_path


def flip(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


DAMAGES = {
    "flipped": flip,
    "truncated": lambda content: content[:-1],
    "empty": lambda content: b"",
    "missing": None,
}


def damage(path, kind):
    content = path.read_bytes()
    path.unlink()
    if kind != "missing":
        path.write_bytes(DAMAGES[kind](content))


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_sampling_refuses_a_damaged_checkpoint(jax_ddpm_here, copy, name, kind):
    """Also where the damage is not in the weights that it draws from."""
    path = copy / "runs/x/checkpoints/00000006" / name
    damage(path, kind)
    result = jax_ddpm_here("sample", "--run", "runs/x", "--out", "x.npz", cwd=copy)
    assert result.returncode == 2 and len(result.stderr.splitlines()) == 1
    assert f"--run: runs/x/checkpoints/00000006/{name}: " in result.stderr
    assert "; the one before: --checkpoint 4\n" in result.stderr
    assert not (copy / "x.npz").exists()


def test_sampling_takes_the_checkpoint_that_it_is_told(jax_ddpm_here, copy):
    damage(copy / "runs/x/checkpoints/00000006/ema.safetensors", "flipped")
    command = ["sample", "--run", "runs/x", "--num", "2", "--out", "x.npz", "--checkpoint"]
    assert jax_ddpm_here(*command, "4", cwd=copy).returncode == 0
    assert np.load(copy / "x.npz")["samples"].shape == (2, 4, 4, 1)
    result = jax_ddpm_here(*command, "5", cwd=copy)
    assert result.returncode == 2
    assert result.stderr == "jax-ddpm: --checkpoint: expected one of 2, 4, 6 in runs/x, got 5\n"


def test_the_checkpoint_before_a_damaged_one_is_named_and_can_be_read(jax_ddpm_here, copy):
    for step in (4, 6):
        damage(copy / f"runs/x/checkpoints/{step:08d}/ema.safetensors", "flipped")
    sample = "sample --num 2 --out x.npz --run {}"
    convert = "convert {} y --to run"
    init = "train --data x.npy --batch-size 4 --steps 2 --name on --init {}"
    folder = "runs/x/checkpoints/0000000"
    for command, run, hint in (
        (f"{sample} --checkpoint 6", "runs/x", "--checkpoint 4"),
        (f"{sample} --checkpoint 4", "runs/x", "--checkpoint 2"),
        (convert, "runs/x", f"{folder}4"),
        (init, "runs/x", f"{folder}4"),
        (init, f"{folder}4", f"{folder}2"),
    ):
        result = jax_ddpm_here(*command.format(run).split(), cwd=copy)
        assert result.returncode == 2 and f"; the one before: {hint}\n" in result.stderr
    for command in (sample, convert, init):
        result = jax_ddpm_here(*command.format(f"{folder}2").split(), cwd=copy)
        assert result.returncode == 0, result.stderr
    weights = [copy / run / "ema.safetensors" for run in (f"{folder}2", "y/checkpoints/00000000")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    damage(weights[0], "flipped")
    for command in (sample, convert, init):
        result = jax_ddpm_here(*command.format(f"{folder}2").split(), cwd=copy)
        assert result.returncode == 2 and "; there is no older one\n" in result.stderr


def test_a_write_that_fails_is_named_and_leaves_nothing(jax_ddpm_here, copy, monkeypatch):
    def fsync(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    before = sorted(copy.rglob("*"))
    monkeypatch.setattr(os, "fsync", fsync)
    run = ["--run", "runs/x", "--steps", "1"]
    for *command, flag, out in (
        ("sample", *run, "--num", "2", "--out", "x.png"),
        ("sample", *run, "--num", "2", "--out", "x.npz"),
        ("export", *run, "--platforms", "cpu", "--out", "x.jaxexport"),
        ("evaluate", *run, "--num", "2", "--data", "x.npy", "--json", "x.json"),
        ("convert", "runs/x", "--to", "run", "OUT", "y"),
        ("convert", "runs/x", "--to", "torch", "OUT", "y.safetensors"),
    ):
        told = [out] if flag == "OUT" else [flag, out]
        result = jax_ddpm_here(*command, *told, cwd=copy)
        assert result.returncode == 2, command
        assert f"jax-ddpm: {flag}: cannot write {out}: No space left on device\n" in result.stderr
    assert sorted(copy.rglob("*")) == before


@pytest.mark.parametrize("name", FILES)
def test_training_falls_back_to_the_last_good_one(jax_ddpm_here, copy, finished, name):
    for step in (4, 6):
        damage(copy / f"runs/x/checkpoints/{step:08d}" / name, "flipped")
    result = jax_ddpm_here(*TRAIN, cwd=copy)
    assert result.returncode == 0, result.stderr
    for step in (4, 6):
        assert (
            f"runs/x/checkpoints/{step:08d}/{name}: damaged" in result.stdout
            and f"set aside as .{step:08d}.damaged\n" in result.stdout
        )
    last = "runs/x/checkpoints/00000006/ema.safetensors"
    assert (copy / last).read_bytes() == (finished / last).read_bytes()


def test_without_a_good_one_nothing_is_thrown_away(jax_ddpm_here, copy):
    for path in list_checkpoints(copy / "runs/x/checkpoints"):
        damage(path / "params.safetensors", "truncated")
    before = sorted((copy / "runs/x").rglob("*"))
    result = jax_ddpm_here(*TRAIN, cwd=copy)
    assert result.returncode == 2 and "no checkpoint is intact: runs/x/checkpoints" in result.stderr
    assert sorted((copy / "runs/x").rglob("*")) == before


def test_a_run_that_never_reached_a_checkpoint_begins_again(jax_ddpm_here, copy, finished):
    shutil.rmtree(copy / "runs/x/checkpoints")
    result = jax_ddpm_here("sample", "--run", "runs/x", cwd=copy)
    assert result.returncode == 2 and "expected a run's folder" in result.stderr
    assert jax_ddpm_here(*TRAIN, cwd=copy).returncode == 0
    last = "runs/x/checkpoints/00000006/ema.safetensors"
    assert (copy / last).read_bytes() == (finished / last).read_bytes()
    shutil.rmtree(copy / "runs/x/checkpoints")
    (copy / "runs/x/config.json").write_text('{"model": ')
    result = jax_ddpm_here(*TRAIN, cwd=copy)
    assert (
        result.returncode == 2 and "runs/x/config.json: expected JSON, got a dam" in result.stderr
    )


def test_a_flipped_setting_in_config_json_misleads_nobody(jax_ddpm_here, copy):
    """The checkpoint's own copy is what counts, and it is under its digest."""
    config = json.loads((copy / "runs/x/config.json").read_text())
    config["scheduler"]["prediction_type"] = "sample"
    command = ["sample", "--run", "runs/x", "--num", "2", "--out"]
    assert jax_ddpm_here(*command, "a.npz", cwd=copy).returncode == 0
    (copy / "runs/x/config.json").write_text(json.dumps(config))
    assert jax_ddpm_here(*command, "b.npz", cwd=copy).returncode == 0
    assert (copy / "a.npz").read_bytes() == (copy / "b.npz").read_bytes()


def test_the_doctor_checks_what_was_exported(jax_ddpm_here, copy, monkeypatch):
    from jax_ddpm.cli import doctor

    monkeypatch.setattr(doctor, "_SECONDS", 0.0)
    export = ["export", "--run", "runs/x", "--steps", "1", "--out", "x.jaxexport"]
    assert jax_ddpm_here(*export, cwd=copy).returncode == 0
    command = ["doctor", "--export", "x.jaxexport"]
    result = jax_ddpm_here(*command, cwd=copy)
    assert result.returncode == 0 and "x.jaxexport: intact" in result.stdout
    for kind in ("flipped", "truncated", "empty"):
        content = (copy / "x.jaxexport").read_bytes()
        damage(copy / "x.jaxexport", kind)
        result = jax_ddpm_here(*command, cwd=copy)
        assert result.returncode == 1 and "x.jaxexport: WRONG: its SHA-256" in result.stdout
        (copy / "x.jaxexport").write_bytes(content)
    (copy / "x.jaxexport.json").write_text("{")
    result = jax_ddpm_here(*command, cwd=copy)
    assert result.returncode == 1 and "x.jaxexport.json: expected JSON" in result.stdout


@pytest.mark.parametrize("kind", DAMAGES)
def test_the_doctor_finds_it(jax_ddpm_here, copy, monkeypatch, kind):
    from jax_ddpm.cli import doctor

    monkeypatch.setattr(doctor, "_SECONDS", 0.0)  # parity has tests of its own
    result = jax_ddpm_here("doctor", "--run", "runs/x", cwd=copy)
    assert result.returncode == 0 and "nothing is wrong" in result.stdout
    assert result.stdout.count(" intact") == 3
    damage(copy / "runs/x/checkpoints/00000004/optimizer.safetensors", kind)
    (copy / "runs/x/config.json").write_text('{"model": ')
    result = jax_ddpm_here("doctor", "--run", "runs/x", cwd=copy)
    assert result.returncode == 1 and "2 thing(s) wrong" in result.stdout
    assert "WRONG: runs/x/checkpoints/00000004/optimizer.safetensors: damaged" in result.stdout
    assert "WRONG: runs/x/config.json" in result.stdout
    assert "the newest checkpoint is intact: remove those that are not" in result.stdout


def test_what_the_doctor_advises_mends_it(jax_ddpm_here, copy, monkeypatch):
    """Training again, of a run that had ended and of one that resumes from before the damage."""
    from jax_ddpm.cli import doctor

    monkeypatch.setattr(doctor, "_SECONDS", 0.0)
    config = (copy / "runs/x/config.json").read_bytes()
    ema = copy / "runs/x/checkpoints/00000006/ema.safetensors"
    words = "sets aside what is damaged and resumes from step 4; until then, sample and others take"
    for content, broken in ((None, "missing"), (b'{"model": ', None)):
        (copy / "runs/x/config.json").unlink()
        if content is not None:
            (copy / "runs/x/config.json").write_bytes(content)
        with (copy / "runs/x/metrics.jsonl").open("a") as file:
            file.write('{"step": 5, "lo\n')
        if broken:
            damage(ema, broken)
        said = jax_ddpm_here("doctor", "--run", "runs/x", cwd=copy).stdout
        assert "config.json: expected" in said and "; the same training command mends it" in said
        assert "metrics.jsonl: 1 line(s) damaged; the same training command drops them" in said
        assert (f"{words} --checkpoint 4" in said) == bool(broken)
        result = jax_ddpm_here(*TRAIN, cwd=copy)
        assert result.returncode == 0 and ("resuming from step 4" in result.stdout) == bool(broken)
        assert jax_ddpm_here("doctor", "--run", "runs/x", cwd=copy).returncode == 0
        assert (copy / "runs/x/config.json").read_bytes() == config
    for path in list_checkpoints(copy / "runs/x/checkpoints"):
        damage(path / "ema.safetensors", "flipped")
    said = jax_ddpm_here("doctor", "--run", "runs/x", cwd=copy).stdout
    assert "no checkpoint is intact: train or convert anew" in said
