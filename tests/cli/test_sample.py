"""`jax-ddpm sample`: what it draws, how many and of which class, and where it writes them."""

from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.evaluating import drawn


def test_classes_go_in_turn_or_are_those_asked_for(untrained, jax_ddpm_here, tmp_path):
    """Of two rows of ten, each column of a picture has one class."""
    command = ["sample", "--run", str(untrained / "runs/digits"), "--steps", "2", "--num", "12"]
    for out, *flags in (["x.npz"], ["y.npz", "--label", "7", "1"], ["x.png"]):
        result = jax_ddpm_here(*command, *flags, "--out", out, cwd=tmp_path)
        assert f"wrote {out}: 12 images, 2 ddim steps each" in result.stdout, result.stderr
    turn, asked = (dict(np.load(tmp_path / f"{name}.npz")) for name in "xy")
    assert turn["labels"].tolist() == [*range(10), 0, 1] and asked["labels"].tolist() == [7, 1] * 6
    assert turn["samples"].shape == (12, 8, 8, 1) and np.any(turn["samples"] != asked["samples"])
    height, width, _ = np.asarray(Image.open(tmp_path / "x.png")).shape
    assert width > 3 * height


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
    """And the chain its guidance, spacing and seed, which is large; of NaN no file is made."""
    draw = Mock(return_value=np.full((64, 8, 8, 1), np.nan, np.float32))
    monkeypatch.setattr("jax_ddpm.cli.sample.draw", draw)
    command = ["sample", "--run", str(untrained / "runs/digits"), "--steps", "4"]
    command += ["--guidance", "3", "--spacing", "leading", "--seed", f"{2**63 - 1}"]
    for flags, expected in (
        ("", "ddim, eta 0.0, use_clipped_model_output True"),
        ("--eta 0.5", "ddim, eta 0.5, use_clipped_model_output True"),
        ("--sampler heun --out y.npz", "heun, max_slope 10.0"),
        ("--sampler dpm_solver_pp", "dpm_solver_pp, k 1, order 2, stochastic False"),
        (
            "--sampler dpm_solver_pp --order 3 --stochastic --out x.npz",
            "dpm_solver_pp, k 2, order 3, stochastic True",
        ),
        ("--sampler ancestral --out pictures", "ancestral"),
    ):
        result = jax_ddpm_here(*command, *flags.split(), cwd=tmp_path)
        assert result.stderr.endswith("samples: expected finite pixels, got NaN or infinity\n")
        (key, run, _), given = draw.call_args
        chain, sampler = given["chain"], given["sampler"]
        # As records of 0.1.0 have it, whose kept samples a draw resumes.
        assert drawn(run, chain, sampler)["sampler"] == expected
        assert key == seed_key(2**63 - 1) and run.guidance == 3
        assert chain.timesteps.tolist() == [0, 5, 10, 15]
    assert not any(tmp_path.iterdir())
