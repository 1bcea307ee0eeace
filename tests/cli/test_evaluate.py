"""`jax-ddpm evaluate`: what it prints and writes."""

import json
import re

import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.cli.evaluate import report


@pytest.fixture(autouse=True)
def briefly(monkeypatch):
    """The classifier learns for a few steps."""
    monkeypatch.setattr("jax_ddpm.evaluation.features._STEPS", 10)


def test_samples_get_a_table_and_figures(jax_ddpm_here, tmp_path):
    drawn = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    runs.save_samples(tmp_path / "x.npz", drawn, np.arange(20, dtype=np.int32) % 10)
    command = ["evaluate", "--samples", "x.npz", "--json", "figures.json"]
    result = jax_ddpm_here(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r" 20 samples +real images\n", result.stdout)
    assert re.search(r"\nFréchet distance \(classifier\) +[\d.]+ +[\d.]+\n", result.stdout)
    assert "so no FID" in result.stdout and "show the requested class, by an SVC" in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["num"], figures["samples"]) == (20, "x.npz")


def test_a_figure_without_a_title_is_printed_by_its_name():
    found = {"num": 3, "my_figure": 0.25, "notes": ["few"], "left_out": {"kid": "why"}}
    lines = "\n".join(report(found | {"recipe": {"seed": 0}}))
    expected = "           3 samples\nmy figure       0.25\nfew\nKID is left out: why\n"
    assert lines == expected + "how this was measured:\n  seed  0"


@pytest.mark.slow
def test_a_run_is_measured_and_its_samples_are_kept(untrained, jax_ddpm_here, tmp_path):
    command = ["evaluate", "--run", str(untrained / "runs/digits"), "--steps", "2", "--num", "12"]
    command += ["--data", "real.npz", "--out", "kept", "--json", "figures.json"]
    images = np.random.default_rng(0).integers(0, 256, (60, 8, 8), np.uint8)
    np.savez(tmp_path / "real.npz", images=images, labels=np.arange(60) % 10)
    result = jax_ddpm_here(*command, "--num-scored", "4", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "bits per dimension\n" in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert 0 <= figures["agreement"] <= 1 and figures["steps"] == 2 and figures["judged"] == 12
    result = jax_ddpm_here(*command, "--seed", "1", cwd=tmp_path)
    assert "the samples in kept are not drawn again" in result.stdout
    assert result.returncode == 2 and "--out: kept holds other samples: seed was" in result.stderr
