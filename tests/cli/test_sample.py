"""`jax-ddpm sample`: what it draws, how many and of which class, and where it writes them."""

import jax
import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.runs.recording import drawn


def test_classes_go_in_turn_or_are_those_asked_for(untrained, jax_ddpm_here, tmp_path):
    command = ["sample", "--run", str(untrained / "runs/digits"), "--steps", "2", "--num", "12"]
    draws = []
    for flags, labels in (([], [*range(10), 0, 1]), (["--label", "7", "1"], [7, 1] * 6)):
        result = jax_ddpm_here(*command, *flags, "--out", "x.npz", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        with np.load(tmp_path / "x.npz") as file:
            draws.append(file["samples"])
            np.testing.assert_array_equal(file["labels"], labels)
    assert draws[0].shape == (12, 8, 8, 1) and draws[0].dtype == np.float32
    assert np.any(draws[0] != draws[1])
    result = jax_ddpm_here(*command, "--out", "x.png", cwd=tmp_path)
    assert result.returncode == 0 and "wrote x.png: 12 images, 2 ddim steps each" in result.stdout
    with Image.open(tmp_path / "x.png") as picture:
        width, height = picture.size
    assert width > 3 * height, "two rows of ten, one class in each column"


@pytest.mark.filterwarnings("default:labels")
def test_a_run_that_learned_no_class_draws_none(untrained, jax_ddpm_here, tmp_path):
    """And a class that is asked for in spite of it is said once."""
    run = runs.load_run(untrained / "runs/digits")._replace(class_names=(*"abcdefghij",))
    runs.save_run(tmp_path / "run", run._replace(learned=(), guidance=1.0))
    command = ["sample", "--run", "run", "--steps", "2", "--num", "2", "--out"]
    for flags, files, said in (
        (["plain"], ["00000.png", "00001.png"], 0),
        (["asked", "--label", "c"], ["00000-c.png", "00001-c.png"], 1),
    ):
        result = jax_ddpm_here(*command, *flags, cwd=tmp_path)
        assert sorted(path.name for path in (tmp_path / flags[0]).iterdir()) == files
        assert result.stderr.count("labels: no image of class c was learned") == said


def test_a_rule_takes_its_own_options(untrained, jax_ddpm_here, monkeypatch, tmp_path):
    """And the chain its guidance, its spacing and its seed."""
    said = []

    def draw(key, run, num, *, chain, sampler, **_):
        said[:] = [drawn(run, chain, sampler)["sampler"], run.guidance, chain.timesteps.tolist()]
        assert key == jax.random.key(5)
        return np.zeros((num, 8, 8, 1), np.float32)

    monkeypatch.setattr("jax_ddpm.cli.sample.draw", draw)
    command = ["sample", "--run", str(untrained / "runs/digits"), "--steps", "4"]
    command += ["--guidance", "3", "--spacing", "leading", "--seed", "5"]
    for flags, name, options in (
        ("", "ddim", "eta 0.0"),
        ("--eta 0.5", "ddim", "eta 0.5"),
        ("--sampler dpm_solver_pp", "dpm_solver_pp", "order 2, stochastic False"),
        ("--sampler dpm_solver_pp --order 3 --stochastic", "dpm_s", "order 3, stochastic True"),
        ("--sampler heun", "heun", ""),
        ("--sampler ancestral", "ancestral", ""),
    ):
        result = jax_ddpm_here(*command, *flags.split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert said[0].startswith(name) and options in said[0]
        assert said[1:] == [3, [0, 5, 10, 15]]
