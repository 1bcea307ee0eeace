"""`jax-ddpm evaluate`: what it prints and writes."""

import json
import re

import numpy as np

from jax_ddpm import runs


def test_samples_get_a_table_and_figures(jax_ddpm_here, monkeypatch, tmp_path):
    monkeypatch.setattr("jax_ddpm.evaluation.classifier._STEPS", 10)
    drawn = np.random.default_rng(0).uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    runs.save_samples(tmp_path / "x.npz", drawn, np.arange(20, dtype=np.int32) % 10)
    command = ["evaluate", "--samples", "x.npz", "--json", "figures.json"]
    result = jax_ddpm_here(*command, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert re.search(r"samples +real images\n", result.stdout)
    assert re.search(r"\nFréchet distance \(classifier\) +[\d.]+ +[\d.]+\n", result.stdout)
    assert "so no FID" in result.stdout and "are what was asked for, by an SVC" in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert (figures["num"], figures["samples"]) == (20, "x.npz")
