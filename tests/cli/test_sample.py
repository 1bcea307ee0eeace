"""`jax-ddpm sample`: what it draws, how many and of which class, and where it writes them."""

from unittest.mock import Mock

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
    assert draws[0].shape == (12, 8, 8, 1) and np.any(draws[0] != draws[1])
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
    draw = Mock(return_value=np.zeros((64, 8, 8, 1), np.float32))
    monkeypatch.setattr("jax_ddpm.cli.sample.draw", draw)
    command = ["sample", "--run", str(untrained / "runs/digits"), "--steps", "4"]
    command += ["--guidance", "3", "--spacing", "leading", "--seed", "5"]
    for flags, expected in (
        ("", "ddim, eta 0.0"),
        ("--eta 0.5", "ddim, eta 0.5"),
        ("--sampler dpm_solver_pp", "order 2, stochastic False"),
        ("--sampler dpm_solver_pp --order 3 --stochastic", "order 3, stochastic True"),
        ("--sampler ancestral", "ancestral"),
    ):
        result = jax_ddpm_here(*command, *flags.split(), cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        (key, run, _), given = draw.call_args
        chain, sampler = given["chain"], given["sampler"]
        assert expected in drawn(run, chain, sampler)["sampler"]
        assert key == jax.random.key(5) and run.guidance == 3
        assert chain.timesteps.tolist() == [0, 5, 10, 15]


def test_seeds_do_not_wrap_and_no_file_is_made_of_nan(untrained, jax_ddpm_here, monkeypatch):
    def draw(key, run, num, **_):
        seen.add(tuple(jax.random.key_data(key).tolist()))
        return np.full((num, 8, 8, 1), np.nan, np.float32)

    monkeypatch.setattr("jax_ddpm.cli.sample.draw", draw)
    before, seen = sorted(untrained.rglob("*")), set()
    for seed, out in (("0", "x.png"), (f"{2**32}", "x.npz"), (f"{2**63 - 1}", "pictures")):
        command = ["sample", "--run", "runs/digits", "--seed", seed, "--out", out]
        result = jax_ddpm_here(*command, cwd=untrained)
        assert result.stderr.endswith("samples: expected finite pixels, got NaN or infinity\n")
    assert sorted(untrained.rglob("*")) == before and len(seen) == 3
