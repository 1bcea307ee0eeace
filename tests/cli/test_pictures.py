"""From a folder of pictures, or an archive of CIFAR-10, to samples: the command's whole way."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from jax_ddpm import runs
from jax_ddpm.cli.config import DataConfig, RunConfig, TrainConfig
from jax_ddpm.cli.errors import UsageError
from jax_ddpm.data import load_dataset

SMALL = ["--unet.block-out-channels", "8", "8", "--batch-size", "6", "--timesteps", "8"]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Twelve pictures of two sizes, in two classes."""
    folder, rng = tmp_path_factory.mktemp("shapes"), np.random.default_rng(0)
    for name in ("bars", "dots"):
        (folder / name).mkdir()
        for number in range(6):
            shape = (20, 30, 3) if number % 2 else (24, 18, 3)
            pixels = rng.integers(0, 256, shape, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def weights_of(folder):
    (last,) = sorted((folder / "checkpoints").glob("0*"))[-1:]
    return load_file(last / "ema.safetensors")


def test_a_folder_is_trained_on_looked_at_and_drawn_from(shapes, tmp_path, jax_ddpm_here):
    train = ["train", "--data", str(shapes), "--image-size", "12", "--crop", "random", "--flip"]
    train += [*SMALL, "--steps", "4", "--checkpoint-every", "2", "--sample-every", "2"]
    train += ["--name", "shapes", "--tracker", "tensorboard"]
    result = jax_ddpm_here(*train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "classes by subfolder: 0 bars, 1 dots" in result.stdout
    assert (
        "images are resized to 12×12, a window cut out anew in each step, mirrored with "
        "probability 1/2" in result.stdout
    )
    assert "12 images of 12×12×3 in 2 classes" in result.stdout
    folder = tmp_path / "runs/shapes"
    previews = sorted(path.name for path in (folder / "samples").iterdir())
    assert previews == ["00000002.png", "00000004.png"]
    with Image.open(folder / "training.gif") as animation:
        assert animation.n_frames == 2
    assert any((folder / "tensorboard").iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["class_names"] == ["bars", "dots"]
    assert config["preparation"]["flip"] is True and config["preparation"]["crop"] == "random"
    (line,) = runs.read_metrics(folder / "metrics.jsonl")
    assert len(line["loss_quarters"]) == 4 and 0 < line["learning_rate"] <= 2e-3
    assert "images/s=" in result.stderr and "waiting=" in result.stderr
    # Nothing of that changes a bit of the weights.
    bare = [*train, "--name", "bare", "--sample-every", "0", "--tracker"]
    assert jax_ddpm_here(*bare, cwd=tmp_path).returncode == 0
    assert not (tmp_path / "runs/bare/samples").exists()
    expected = weights_of(folder)
    for name, array in weights_of(tmp_path / "runs/bare").items():
        np.testing.assert_array_equal(array, expected[name])
    # Changes are named, each by its flag.
    for flags, words in (
        (["--crop", "center"], "--crop: was random, is center"),
        (["--unet.dropout", "0.1"], "--unet: was {'block_out_channels': [8, 8]}, is"),
    ):
        result = jax_ddpm_here(*train, *flags, "--steps", "6", cwd=tmp_path)
        assert result.returncode == 2 and words in result.stderr

    sample = ["sample", "--run", "runs/shapes", "--num", "3", "--steps", "2"]
    result = jax_ddpm_here(*sample, "--label", "dots", "--out", "drawn", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    files = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert files == ["00000-dots.png", "00001-dots.png", "00002-dots.png"]
    result = jax_ddpm_here(*sample, "--label", "1", "--out", "x.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    drawn = np.load(tmp_path / "x.npz")
    assert drawn["labels"].tolist() == [1, 1, 1] and drawn["arr_0"].dtype == np.uint8
    for number, name in enumerate(files):
        picture = np.asarray(Image.open(tmp_path / "drawn" / name))
        np.testing.assert_array_equal(picture, drawn["arr_0"][number])
    result = jax_ddpm_here(*sample, "--label", "cats", cwd=tmp_path)
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        2,
        "jax-ddpm: --label: expected bars, dots, got 'cats'",
    )
    result = jax_ddpm_here(*sample, "--out", "drawn", cwd=tmp_path)
    assert result.returncode == 2 and "--out: expected a new or empty folder" in result.stderr
    result = jax_ddpm_here(
        "evaluate", "--run", "runs/shapes", "--data", str(shapes), "--num", "4", cwd=tmp_path
    )
    assert result.returncode == 0 and "bits per dimension at most" in result.stdout, result.stderr

    result = jax_ddpm_here("evaluate", "--run", "runs/shapes", cwd=tmp_path)
    assert result.returncode == 2 and "learned; --data says where those are" in result.stderr

    # What starts from this run reads pictures as it did.
    again = ["train", "--init", "runs/shapes", "--data", str(shapes), "--name", "again"]
    again += ["--steps", "1", "--batch-size", "6", "--skip-unreadable"]
    result = jax_ddpm_here(*again, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    preparation = runs.load_run(tmp_path / "runs/again").preparation
    assert preparation.crop == "random" and preparation.skip_unreadable

    # A run that is whole keeps its pictures; one that resumes without samples keeps those it has.
    result = jax_ddpm_here(*train, cwd=tmp_path)
    assert result.returncode == 0 and (folder / "training.gif").exists(), result.stderr
    longer = [*train, "--steps", "6", "--sample-every", "0", "--accept-changes"]
    result = jax_ddpm_here(*longer, cwd=tmp_path)
    assert result.returncode == 0 and (folder / "training.gif").exists(), result.stderr
    assert previews == sorted(path.name for path in (folder / "samples").iterdir())


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("..", "here"),
        (".", "pictures"),
        ("set.2024", "set.2024"),
        ("x.tar.gz", "x"),
        ("x.npz", "x"),
        ("hf://someone/birds", "birds"),
    ],
)
def test_a_run_is_called_as_its_images_are(tmp_path, monkeypatch, data, name):
    (tmp_path / "here/pictures/set.2024").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/pictures")
    assert TrainConfig(data=DataConfig(data=data)).folder == Path("runs", name)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b"])
def test_a_name_is_that_of_a_folder(name):
    with pytest.raises(UsageError, match="--name: expected the name of a folder"):
        _ = TrainConfig(run=RunConfig(name=name)).folder


def test_unreadable_pictures_end_the_command_or_are_counted(shapes, tmp_path, jax_ddpm_here):
    shutil.copytree(shapes, tmp_path / "x")
    (tmp_path / "x/dots/broken.jpg").write_bytes(b"\xff\xd8 not a picture")
    train = ["train", "--data", "x", "--image-size", "8", *SMALL, "--steps", "1"]
    result = jax_ddpm_here(*train, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith(
        "jax-ddpm: --data: cannot read dots/broken.jpg: "
    )
    result = jax_ddpm_here(*train, "--skip-unreadable", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "pictures that cannot be read, left out: 1 (dots/broken.jpg: " in result.stdout


@pytest.fixture(scope="module")
def cifar10(tmp_path_factory):
    """CIFAR-10's binary archive, ten images a batch."""
    path, rng = (
        tmp_path_factory.mktemp("cifar") / "cifar-10-binary.tar.gz",
        np.random.default_rng(0),
    )
    names = "airplane automobile bird cat deer dog frog horse ship truck".split()
    files = {"batches.meta.txt": "\n".join([*names, ""]).encode()}
    for batch in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5"):
        records = rng.integers(0, 256, (10, 3073), np.uint8)
        records[:, 0] = np.arange(10)
        files[f"{batch}.bin"] = records.tobytes()
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_the_recipe_of_cifar10_runs_from_its_archive(cifar10, tmp_path, jax_ddpm_here):
    """With a network of few channels; all the rest is the recipe's."""
    train = ["train", "--recipe", "cifar10", "--data", str(cifar10), "--steps", "1"]
    train += ["--unet.block-out-channels", "8", "8", "8", "8", "--unet.norm-num-groups", "4"]
    train += ["--unet.layers-per-block", "1", "--batch-size", "4", "--timesteps", "4"]
    result = jax_ddpm_here(*train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "CIFAR-10: the training images" in result.stdout
    assert "labels are left out, as asked" in result.stdout
    config = json.loads((tmp_path / "runs/cifar-10-binary/config.json").read_text())
    trained = config["train"]
    assert (trained["learning_rate"], trained["warmup_steps"]) == (2e-4, 5000)
    assert trained["learning_rate_schedule"] == "constant" and trained["ema_warmup"] is False
    assert config["scheduler"]["variance_type"] == "fixed_large"
    assert config["model"]["dropout"] == 0.1 and config["num_classes"] is None
    assert config["preparation"]["flip"] is True
    assert load_dataset(cifar10).class_names[3] == "cat"


def test_a_network_from_a_config_of_diffusers(shapes, tmp_path, jax_ddpm_here):
    config = {
        "_class_name": "UNet2DModel",
        "block_out_channels": [8, 16],
        "down_block_types": ["DownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "UpBlock2D"],
        "norm_num_groups": 4,
        "attention_head_dim": None,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    train = ["train", "--data", str(shapes), "--image-size", "8", "--steps", "1", "--name", "x"]
    train += ["--batch-size", "4", "--unet-config", "config.json", "--unet.layers-per-block", "1"]
    result = jax_ddpm_here(*train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    model = runs.load_run(tmp_path / "runs/x").pretrained.model
    assert model.block_out_channels == (8, 16) and model.layers_per_block == 1
    assert (model.in_channels, model.num_class_embeds) == (3, 3)
    for flags, words in (
        (["--unet-config", "nowhere.json"], "--unet-config: nowhere.json: expected a JSON file"),
        (["--unet.act-fn", "tanh"], "--unet: the network refuses images"),
        (["--optimizer", "adam", "--weight-decay", "0.1"], "--weight-decay: comes with --optimiz"),
        (["--model", "simple"], "--unet: comes with --model unet"),
        (["--image-size", "0"], "--image-size: expected a whole number above 0, got 0"),
        (["--tracker", "tensorbored"], "tensorbored"),
    ):
        result = jax_ddpm_here(*train, *flags, cwd=tmp_path)
        assert result.returncode == 2 and words in result.stderr + result.stdout, flags
