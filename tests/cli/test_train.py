"""`jax-ddpm train`: from a folder of pictures to a run and its samples, in a process of its own."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest
from PIL import Image

from jax_ddpm import runs
from jax_ddpm.cli.config import DataConfig, RunConfig, TrainConfig
from jax_ddpm.cli.errors import UsageError
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.runs import RECIPES
from jax_ddpm.runs.model import FILES

NETWORK = "--unet.block-out-channels 8 --unet.norm-num-groups 4 --unet.layers-per-block 1".split()
NETWORK += "--unet.down-block-types DownBlock2D --unet.up-block-types UpBlock2D".split()
NETWORK += "--unet.mid-block-type none".split()
PREPARATION = Preparation(image_size=12, crop="random", flip=True, skip_unreadable=True)
SHORT = ["--batch-size", "4", "--timesteps", "4", "--steps", "60"]
READ = ["--data", "shapes", "--image-size", "12", "--crop", "random", "--skip-unreadable"]
TRAIN = ["train", *READ, "--flip", *NETWORK, *SHORT]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Twelve pictures of two sizes in two classes, and one that cannot be read; and a run."""
    cwd, rng = tmp_path_factory.mktemp("trained"), np.random.default_rng(0)
    for name, size in (("bars", (24, 18)), ("dots", (20, 30))):
        pixels = rng.integers(0, 256, (6, *size, 3), np.uint8)
        runs.save_samples(cwd / "shapes" / name, pixels)
    (cwd / "shapes/dots/broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    env, command = os.environ | {"JAX_PLATFORMS": "cpu"}, [sys.executable, "-m", "jax_ddpm", *TRAIN]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return cwd, result


def test_it_writes_a_run_and_says_so(trained):
    cwd, result = trained
    folder = cwd / "runs/shapes"
    for words in (
        "pictures that cannot be read, left out: 1 (dots/broken.jpg: ",
        "classes by subfolder: 0 bars, 1 dots",
        "images are prepared with image_size=12, crop='random', flip=True, skip_unreadable=True",
        "12 images of 12×12×3 in 2 classes",
        "compiling…",
        *FILES,
        "next: jax-ddpm sample runs/shapes",
    ):
        assert words in result.stdout
    assert {path.name for path in folder.iterdir()} == {*FILES, ".lock"}
    lines = runs.read_metrics(folder / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(2, 62, 2))
    first, second = (np.mean([line["loss"] for line in half]) for half in (lines[:15], lines[15:]))
    assert second < first
    with Image.open(folder / "forward.png") as picture:
        assert picture.width < 2.5 * picture.height, "two images at four steps"
    with Image.open(folder / "reverse.gif") as animation:
        assert animation.n_frames == 5
    config = json.loads((folder / "config.json").read_text())
    expected = {"image_shape": [12, 12, 3], "class_names": ["bars", "dots"], "null_label": 2}
    assert config.items() >= {**expected, "preparation": PREPARATION.record()}.items()


def test_it_is_measured_on_its_own_pictures(trained, jax_ddpm_here, monkeypatch, tmp_path):
    """Which are read as it read them, but whole and not mirrored."""
    cwd, shapes = trained[0], trained[0] / "shapes"
    report = {"bits_per_dim": 3.0, "num": 0, "notes": [], "left_out": {}, "recipe": {"seed": 0}}
    measure = Mock(return_value=report)
    monkeypatch.setattr("jax_ddpm.cli.evaluate.measure", measure)
    evaluate = "evaluate --run runs/shapes --num 0 --num-scored 4 --json figures.json".split()
    result = jax_ddpm_here(*evaluate, "--seed", "3", cwd=cwd)
    assert "at most 3.000 bits per dimension\n" in result.stdout, result.stderr
    assert "changed since training" not in result.stdout
    (_, data), options = measure.call_args
    assert (options["num"], options["num_scored"], options["seed"]) == (0, 4, 3)
    assert data.preparation.crop == "center" and not data.preparation.flip
    assert json.loads((cwd / "figures.json").read_text()) == {"run": "runs/shapes", **report}
    # Other pictures; none; and a record that is relative to a folder that nobody knows.
    (shapes / "bars/00000.png").rename(tmp_path / "x.png")
    result = jax_ddpm_here(*evaluate, cwd=cwd)
    (tmp_path / "x.png").rename(shapes / "bars/00000.png")
    assert "shapes: images or labels have changed since training\n" in result.stdout
    shapes.rename(tmp_path / "shapes")
    gone = jax_ddpm_here(*evaluate, cwd=cwd)
    (tmp_path / "shapes").rename(shapes)
    path = cwd / "runs/shapes/checkpoints/00000060/state.json"
    whole = path.read_text()
    path.write_text(whole.replace(json.dumps(str(shapes)), json.dumps("shapes")))
    nowhere = jax_ddpm_here(*evaluate, cwd=cwd)
    path.write_text(whole)
    for result, place in ((gone, shapes), (nowhere, "shapes")):
        assert f"--data: the images that the run learned, {place}, are not th" in result.stderr
        assert result.returncode == 2


@pytest.fixture
def asked(trained, jax_ddpm_here, monkeypatch):
    """What a command asks the library to train: the folder, the images, the settings."""
    open_run = Mock(side_effect=UsageError("trained elsewhere"))
    monkeypatch.setattr("jax_ddpm.cli.train.open_run", open_run)

    def ask(*arguments):
        result = jax_ddpm_here("train", *arguments, cwd=trained[0])
        assert result.stderr.endswith("jax-ddpm: trained elsewhere\n"), result.stderr
        return open_run.call_args.args

    return ask


def test_flags_are_the_librarys_settings(asked, one_level):
    folder, data, settings = asked(*TRAIN[1:])
    unet = {**one_level, "layers_per_block": 1}
    assert settings == runs.Settings(unet=unet, batch_size=4, timesteps=4, steps=60)
    assert (folder, data.preparation) == (Path("runs/shapes"), PREPARATION)
    assert data.digest() == load_dataset(Path("shapes"), PREPARATION).digest()
    folder, data, settings = asked()
    assert (folder, data.source, settings) == (Path("runs/digits"), "digits", runs.Settings())
    # A recipe sets what is not given; its model is unconditional.
    _, data, settings = asked("--recipe=cifar10", *READ, "--unet.dropout", "0.2", "--steps", "9")
    recipe = RECIPES["cifar10"].settings
    assert settings == replace(recipe, steps=9, unet={**recipe.unet, "dropout": 0.2})
    assert data.preparation.flip and data.labels is None


def test_a_start_from_a_run_or_from_a_config_of_diffusers(asked, trained, one_level):
    """Pictures are read as the run read them."""
    init = ["--init", "runs/shapes", "--data", "shapes", "--skip-unreadable"]
    _, data, settings = asked(*init)
    assert settings.init == Path("runs/shapes") and data.preparation == PREPARATION
    folder, data, _ = asked(*init, "--name", "again", "--image-size", "10")
    assert folder == Path("runs/again") and data.preparation.image_size == 10
    config = {"_class_name": "UNet2DModel", **one_level, "attention_head_dim": None}
    (trained[0] / "network.json").write_text(json.dumps(config))
    flags = ["--unet-config", "network.json", "--unet.layers-per-block", "1"]
    _, _, settings = asked(*READ, *flags, "--unet.act-fn", "gelu")
    expected = {"block_out_channels": [8], "layers_per_block": 1, "act_fn": "gelu"}
    assert settings.unet.items() >= expected.items()


def test_a_run_is_called_as_its_images_are(tmp_path, monkeypatch):
    (tmp_path / "here/pictures/set.2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/pictures")
    names = {"..": "here", ".": "pictures", "set.2024": "set.2024", "x.tar.gz": "x", "x.npz": "x"}
    for data, name in (names | {"hf://someone/birds": "birds"}).items():
        assert TrainConfig(data=DataConfig(data=data)).folder == Path("runs", name)
    for name in ("", ".", "..", "a/b"):
        with pytest.raises(UsageError, match="--name: expected the name of a folder"):
            _ = TrainConfig(run=RunConfig(name=name)).folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        "--fsdp 2 --accumulate 2 --remat --dtype bfloat16 --steps 6 --steps-per-dispatch 3 "
        "--compilation-cache cache --tracker tensorboard",
        "--recipe cifar10 --data {} --image-size 12 --skip-unreadable --evaluate-every 50 "
        "--evaluate-num 8 --keep-best --sample-every 30",
    ],
)
def test_other_trainings(flags, trained, jax_ddpm_here, tmp_path):
    flags = flags.format(trained[0] / "shapes").split()
    result = jax_ddpm_here("train", *NETWORK, *SHORT, *flags, "--name", "x", cwd=tmp_path)
    assert result.returncode == 0 and "wrote runs/x/" in result.stdout, result.stderr
    line = runs.read_metrics(tmp_path / "runs/x/metrics.jsonl")[-1]
    assert np.isfinite(line["loss"]) and ("best: step" in result.stdout) == ("--keep-best" in flags)
    assert any((tmp_path / "runs/x").glob("tensorboard/*")) == ("--tracker" in flags)
    weights = jax.tree.leaves(runs.load_run(tmp_path / "runs/x").variables)
    assert all(x.dtype == np.float32 and np.all(np.isfinite(x)) for x in weights)
