"""`jax-ddpm evaluate`: what it prints and writes, of runs, samples and statistics; its mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest

from jax_ddpm import runs
from jax_ddpm.evaluation import save_statistics, statistics
from jax_ddpm.models import ddpm_digits

pytestmark = pytest.mark.usefixtures("defaults")


@pytest.fixture(scope="module")
def here(tmp_path_factory, write_run):
    """A run, samples of digits and noise, and statistics that stand for images."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = ddpm_digits(block_out_channels=(8, 8), sample_size=8)
    write_run(folder / "runs/digits", model, num_classes=10)
    random = np.random.default_rng(0)
    np.save(folder / "noise.npy", random.integers(0, 256, (40, 8, 8, 1), np.uint8))
    images = random.uniform(-1, 1, (20, 8, 8, 1)).astype(np.float32)
    runs.save_samples(folder / "x.npz", images, np.arange(20, dtype=np.int32) % 10)
    np.save(folder / "colours.npy", random.integers(0, 256, (6, 8, 8, 3), np.uint8))
    rows = random.standard_normal((30, 2048))
    save_statistics(folder / "stats.npz", statistics(rows))
    save_statistics(folder / "other.npz", statistics(rows[:, :100]))
    return folder


def test_samples_get_a_table_and_a_recipe(here, jax_ddpm_here):
    command = ["evaluate", "--samples", "x.npz", "--json", "figures.json"]
    result = jax_ddpm_here(*command, cwd=here)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    title = next(line for line in lines if "samples" in line and "real images" in line)
    (row,) = [line for line in lines if line.startswith("Fréchet distance (classifier)")]
    assert title.index("samples") < title.index("real images") and len(row.split()) == 5
    assert "so no FID" in result.stdout and "are what was asked for, by an SVC" in result.stdout
    figures = json.loads((here / "figures.json").read_text())
    assert (
        figures["num"] == 20
        and figures["samples"] == "x.npz"
        and "20 of the 20" in figures["recipe"]["samples"]
    )
    assert (
        figures["classifier_frechet_distance"]
        > 5 * (figures["held_out"]["classifier_frechet_distance"])
    )


def test_neither_samples_nor_bits(here, jax_ddpm_here, tmp_path):
    """The digits have 17 levels, which are no 8 bits."""
    command = ["evaluate", "--run", str(here / "runs/digits"), "--num", "0", "--steps", "2"]
    result = jax_ddpm_here(*command, cwd=tmp_path)
    assert (
        result.returncode == 2 and "--num: expected more than 0, since no images" in result.stderr
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--samples", "nowhere.npz"], "--samples: no such file or folder: nowhere.npz"),
        (["--samples", "x.npz", "--num", "21"], "--num: expected at most 20, the samples, got 21"),
        (["--samples", "x.npz", "--run", "runs/digits"], "--run: cannot be given with --samples"),
        (["--samples", "x.npz", "--steps", "3"], "--steps: cannot be given with --samples"),
        (["--samples", "colours.npy"],
         "--dataset: digits cannot be prepared as the samples are; --data says where real images"),
        (["--samples", "x.npz", "--inception", "w.pth"], "--inception: expected images of 3 cha"),
        (["--samples", "colours.npy", "--data", "colours.npy", "--inception", "w.pth"],
         "--inception: no such file: w.pth: FID's Inception is weights-inception-2015-12-05"),
        (["--samples", "x.npz", "--reference", "stats.npz"],
         "--reference: statistics are of Inception's features, and come with --inception: FID's"),
        (["--samples", "x.npz", "--save-statistics", "new.npz"],
         "--save-statistics: expected Inception's weights and real images, got no weights"),
        (["--run", "runs/digits", "--json", "/proc/x"], "--json: cannot write /proc/x"),
        ([], "expected --run, --pretrained or --samples, and one of them only"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line(here, jax_ddpm_here, arguments, words, monkeypatch):
    monkeypatch.delenv("JAX_DDPM_INCEPTION", raising=False)
    result = jax_ddpm_here("evaluate", *arguments, cwd=here)
    assert result.returncode == 2 and words in result.stderr.splitlines()[-1], result.stderr
    assert not (Path(here) / "new.npz").exists()
