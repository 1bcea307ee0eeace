"""The command line as a user meets it: real processes, their output and what they leave behind."""

import itertools
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from jax_ddpm import __version__ as jax_ddpm_version
from jax_ddpm.models import ddpm_digits

TRAIN = ["train", "--steps", "60", "--batch-size", "8", "--timesteps", "20"]


def jax_ddpm(*arguments, cwd):
    """Run `jax-ddpm`; a single line on the error stream is what the user reads."""
    devices = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    environment = {**os.environ, **devices}
    return subprocess.run(
        [sys.executable, "-m", "jax_ddpm", *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run on the digits."""
    cwd = tmp_path_factory.mktemp("train")
    result = jax_ddpm(*TRAIN, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd, result


@pytest.fixture(scope="module")
def untrained(tmp_path_factory, defaults, write_run):
    """A folder with a run of few channels, nothing trained."""
    cwd = tmp_path_factory.mktemp("untrained")
    model = ddpm_digits(block_out_channels=(8, 8), sample_size=8)
    write_run(cwd / "runs/digits", model, num_classes=10)
    return cwd


def test_train_writes_a_run_and_says_so(trained):
    cwd, result = trained
    folder = cwd / "runs" / "digits"
    names = {path.name for path in folder.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "checkpoints",
        "loss.png",
        "forward.png",
        "samples.png",
        "reverse.gif",
    }
    assert all(name in result.stdout for name in names - {".lock"})
    assert "next: jax-ddpm sample --run runs/digits" in result.stdout
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [50, 60]
    assert lines[1]["loss"] < lines[0]["loss"]
    config = json.loads((folder / "config.json").read_text())
    assert config["image_shape"] == [8, 8, 1] and config["num_classes"] == 10
    assert config["model"]["_class_name"] == "UNet2DModel"
    assert config["model"]["num_class_embeds"] == 11  # the last is the null label
    assert "1,797 images of 8×8×1 in 10 classes" in result.stdout
    with Image.open(folder / "reverse.gif") as animation:
        assert animation.n_frames == 21


@pytest.mark.slow
def test_the_same_command_trains_the_same_weights(trained, tmp_path):
    cwd, _ = trained
    assert jax_ddpm(*TRAIN, cwd=tmp_path).returncode == 0
    weights = "runs/digits/checkpoints/00000060/ema.safetensors"
    assert (tmp_path / weights).read_bytes() == (cwd / weights).read_bytes()


def test_a_sample_is_its_own_however_many_are_drawn(jax_ddpm_here, untrained):
    command = ["sample", "--run", "runs/digits", "--steps", "10"]
    for sampler in ("ddim", "ancestral"):
        draws = []
        for out, extra in (("all.npz", ["--num", "20"]), ("few.npz", ["--num", "5"])):
            flags = ["--sampler", sampler, "--out", out, *extra]
            result = jax_ddpm_here(*command, *flags, cwd=untrained)
            assert result.returncode == 0, result.stderr
            draws.append(np.load(untrained / out)["samples"])
        assert draws[0].shape == (20, 8, 8, 1) and draws[0].dtype == np.float32
        np.testing.assert_allclose(draws[0][:5], draws[1], atol=1e-4)


def test_sample_writes_a_picture(untrained):
    result = jax_ddpm("sample", "--run", "runs/digits", "--num", "6", "--steps", "5", cwd=untrained)
    assert result.returncode == 0, result.stderr
    with Image.open(untrained / "samples.png") as picture:
        assert picture.size[0] > 300 and picture.size[1] > 100  # six digits in a row


@pytest.mark.parametrize(
    "write",
    [
        lambda path, images: np.save(path / "images.npy", images),
        lambda path, images: np.savez(path / "images.npz", images=images, labels=np.arange(20)),
        lambda path, images: [
            Image.fromarray(image).save(path / f"{k}.png") for k, image in enumerate(images)
        ],
    ],
    ids=["npy", "npz", "folder"],
)
def test_train_takes_your_own_images(jax_ddpm_here, tmp_path, write):
    data = tmp_path / "data"
    data.mkdir()
    write(data, np.random.default_rng(0).integers(0, 256, (20, 6, 5, 3), np.uint8))
    files = list(data.iterdir())
    path = files[0] if len(files) == 1 else data
    result = jax_ddpm_here(
        "train", "--model", "simple", "--data", str(path), "--steps", "2", "--batch-size", "4",
        "--timesteps", "4",
        cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "20 images of 6×5×3" in result.stdout


def _bad_data(tmp_path):
    np.save(tmp_path / "wide.npy", np.full((4, 8, 8), 300.0))
    np.save(tmp_path / "flat.npy", np.zeros((4, 8), np.uint8))
    np.save(tmp_path / "nan.npy", np.full((4, 8, 8), np.nan))
    (tmp_path / "torn.npy").write_bytes(b"\x93NUMPY")
    (tmp_path / "torn.npz").write_bytes(b"PK")
    np.save(tmp_path / "odd.npy", np.zeros((99, 5, 5), np.uint8))
    np.savez(tmp_path / "labels.npz", x=np.zeros((99, 8, 8), np.uint8), y=np.zeros(5, int))
    np.savez(tmp_path / "float.npz", x=np.zeros((99, 8, 8), np.uint8), y=np.zeros(99))
    (tmp_path / "weights.pt").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("hello")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "--data", "nowhere"], "--data: no such file or folder: nowhere"),
        (["train", "--data", "empty"], "--data: no pictures in empty"),
        (["train", "--data", "notes.txt"], "--data: expected a .npz, a .npy or a folder"),
        (["train", "--data", "wide.npy"], "--data: expected float pixels in [0, 1] or [-1, 1]"),
        (["train", "--data", "flat.npy"], "--data: expected images of shape"),
        (["train", "--data", "nan.npy"], "--data: expected finite pixels"),
        (["train", "--data", "torn.npy"], "--data: cannot read torn.npy"),
        (["train", "--data", "torn.npz"], "--data: cannot read torn.npz"),
        (["train", "--batch-size", "5000"], "--batch-size: expected at most 1797"),
        (["train", "--steps", "0"], "--steps: expected more than 0, got 0"),
        (["train", "--ema-decay", "1"], "--ema-decay: expected 0 to 1"),
        (["train", "--name", "a/b"], "--name: expected the name of a folder"),
        (["train", "--out", "notes.txt"], "--out: cannot write"),
        (["train", "--init", "empty"], "--init: empty/config.json: expected a JSON file"),
        (["train", "--data", "odd.npy"], "--data: the network refuses images of (5, 5, 1)"),
        (["train", "--data", "labels.npz"], "--data: expected a label for each of 99 images"),
        (["train", "--data", "float.npz"], "--data: expected integer labels in float.npz, got fl"),
        (["train", "--init", "empty", "--timesteps", "9"], "--timesteps: comes with --init"),
        (["train", "--label-dropout", "2"], "--label-dropout: expected 0 to 1, got 2"),
        (["sample"], "expected --run or --pretrained, and one of them only"),
        (["sample", "--run", "a", "--pretrained", "b"], "and one of them only"),
        (["sample", "--pretrained", "nowhere"], "--pretrained: nowhere: expected a folder of di"),
        (["convert", "nowhere", "x", "--to", "run"], "SOURCE: no such file or folder: nowhere"),
        (["convert", "notes.txt", "x", "--to", "run"], "SOURCE: notes.txt: expected a safetensors"),
        (["convert", "weights.pt", "x", "--to", "run"], "SOURCE: weights.pt is a pickle, which"),
        (["evaluate", "--run", "nowhere"], "--run: expected a run's folder, got nowhere"),
        (["sample", "--run", "nowhere"], "--run: expected a run's folder, got nowhere"),
        (["sample", "--run", "empty"], "--run: expected a run's folder, got empty"),
        (["sample", "--run", "empty", "--out", "a.jpg"], "--out: expected a .png or a .npz"),
        (
            ["sample", "--run", "empty", "--order", "3"],
            "--order: comes with --sampler dpm_",
        ),
        (["sample", "--run", "empty", "--eta", "2"], "--eta: expected 0 to 1, got 2"),
        (["parity", "--json", "no/where.json"], "--json: no such folder: no"),
        (["evaluate", "--run", "empty", "--json", "empty"], "--json: expected a file, got the fo"),
        (["evaluate", "--run", "empty", "--json", "/proc/x"], "--json: cannot write /proc/x: "),
        (["sample", "--run", "empty", "--out", "/proc/x.png"], "--out: cannot write /proc/x.png: "),
        (["export", "--run", "empty", "--out", "/proc/x.jaxexport"], "--out: cannot write /proc/x"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(jax_ddpm_here, tmp_path, arguments, words):
    _bad_data(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = jax_ddpm_here(*arguments, cwd=tmp_path)
    assert result.returncode == 2
    assert words in result.stderr and len(result.stderr.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--lr", "3"], "--lr: no such flag of train; did you mean --learning-rate?"),
        (["sample", "--stps=4"], "--stps: no such flag of sample; did you mean --steps?"),
        (["doctor", "--xyz"], "--xyz: no such flag of doctor; see jax-ddpm doctor --help"),
    ],
)
def test_an_unknown_flag_names_the_nearest(jax_ddpm_here, tmp_path, arguments, line):
    result = jax_ddpm_here(*arguments, cwd=tmp_path)
    assert (result.returncode, result.stderr) == (2, f"jax-ddpm: {line}\n")


def test_more_steps_than_the_model_has_are_named(jax_ddpm_here, untrained):
    result = jax_ddpm_here("sample", "--run", "runs/digits", "--steps", "21", cwd=untrained)
    assert result.returncode == 2
    assert "--steps: expected at most 20, the model's timesteps, got 21" in result.stderr


def test_samples_are_of_the_class_that_is_asked_for(jax_ddpm_here, untrained):
    command = ["sample", "--run", "runs/digits", "--num", "12", "--steps", "4", "--out", "x.npz"]
    assert jax_ddpm_here(*command, cwd=untrained).returncode == 0
    in_turn = np.load(untrained / "x.npz")
    np.testing.assert_array_equal(in_turn["labels"], np.arange(12) % 10)
    threes = [*command, "--label", "3", "--sampler", "heun"]
    assert jax_ddpm_here(*threes, cwd=untrained).returncode == 0
    np.testing.assert_array_equal(np.load(untrained / "x.npz")["labels"], np.full(12, 3))
    assert jax_ddpm_here(*command, "--label", "7", "1", cwd=untrained).returncode == 0
    np.testing.assert_array_equal(np.load(untrained / "x.npz")["labels"], [7, 1] * 6)
    result = jax_ddpm_here(*command, "--label", "10", cwd=untrained)
    assert result.returncode == 2 and "--label: expected 0 to 9, got 10" in result.stderr


def test_a_rule_takes_its_own_options(jax_ddpm_here, untrained):
    """ddim with eta 0 draws no noise; the others do."""
    command = ["sample", "--run", "runs/digits", "--num", "2", "--steps", "4", "--out", "x.npz"]
    drawn = []
    for options in ([], ["--eta", "0"], ["--eta", "1"], ["--sampler", "dpm_solver_pp"],
                    ["--sampler", "dpm_solver_pp", "--order", "3"],
                    ["--sampler", "dpm_solver_pp", "--stochastic"]):  # fmt: skip
        result = jax_ddpm_here(*command, *options, cwd=untrained)
        assert result.returncode == 0, result.stderr
        drawn.append(np.load(untrained / "x.npz")["samples"])
    np.testing.assert_array_equal(drawn[1], drawn[0])
    for first, second in itertools.combinations(drawn[1:], 2):
        assert np.max(np.abs(first - second)) > 1e-3


def test_evaluate_prints_and_writes_its_figures(untrained):
    command = ["evaluate", "--run", "runs/digits", "--num", "20", "--steps", "4"]
    result = jax_ddpm(*command, "--json", "figures.json", cwd=untrained)
    assert result.returncode == 0, result.stderr
    assert "are what was asked for, by an SVC that is right on 99" in result.stdout
    figures = json.loads((untrained / "figures.json").read_text())
    assert 0 <= figures["agreement"] <= 1 and figures["steps"] == 4


def test_what_convert_says_of_classes_runs(jax_ddpm_here, untrained, tmp_path, torch, diffusers):
    run = str(untrained / "runs/digits")
    result = jax_ddpm_here("convert", run, "there", "--to", "diffusers", cwd=tmp_path)
    hint = result.stdout.partition("next: ")[2]
    names = {"x": torch.zeros(2, 1, 8, 8), "t": 3, "labels": torch.tensor([0, 10])}
    names["DDPMPipeline"] = diffusers.DDPMPipeline  # the fixture left us in the folder
    assert eval(hint, names).sample.shape == (2, 1, 8, 8)


def test_a_run_goes_to_diffusers_and_comes_back(jax_ddpm_here, untrained, tmp_path):
    """Weights to the bit, the same pictures, and training resumes from there."""
    run = str(untrained / "runs/digits")
    result = jax_ddpm_here("convert", run, "there", "--to", "diffusers", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    hint = "DDPMPipeline.from_pretrained('there').unet(x, t, class_labels=labels)"
    assert f"next: {hint}" in result.stdout
    assert jax_ddpm_here("convert", "there", "back", "--to", "run", cwd=tmp_path).returncode == 0
    weights = (untrained / "runs/digits/checkpoints/00000000/ema.safetensors").read_bytes()
    assert (tmp_path / "back/checkpoints/00000000/ema.safetensors").read_bytes() == weights

    sample = ["--num", "10", "--steps", "4", "--out", "x.npz", "--guidance", "3"]
    pictures = []
    for source in (["--run", run], ["--pretrained", "there"], ["--run", "back"]):
        plain = ["sample", *source, "--num", "12", "--steps", "2", "--guidance", "1"]
        assert jax_ddpm_here(*plain, "--out", "y.npz", cwd=tmp_path).returncode == 0
        np.testing.assert_array_equal(
            np.load(tmp_path / "y.npz")["labels"], [*range(10), 0, 1]
        )  # and never the null label, 10
        result = jax_ddpm_here("sample", *source, *sample, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        pictures.append(np.load(tmp_path / "x.npz")["samples"])
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])

    # Training resumes in float32, also from sixteen bits.
    path = tmp_path / "there/unet/diffusion_pytorch_model.safetensors"
    half = {name: x.astype(np.float16) for name, x in load_file(path).items()}
    save_file(half, path, metadata={"format": "pt"})
    train = ["train", "--init", "there", "--steps", "2", "--batch-size", "8", "--name", "on"]
    result = jax_ddpm_here(*train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    config = json.loads((tmp_path / "runs/on/config.json").read_text())
    assert (config["num_classes"], config["null_label"], config["guidance"]) == (10, 10, 2.0)
    weights = load_file(tmp_path / "runs/on/checkpoints/00000002/ema.safetensors")
    assert all(x.dtype == np.float32 for x in weights.values())
    metrics = json.loads((tmp_path / "runs/on/metrics.jsonl").read_text())
    assert np.isfinite(metrics["loss"])
    assert "wrote runs/on/" in result.stdout


@pytest.mark.usefixtures("torch")
def test_the_tutorials_network_and_its_state_dict(jax_ddpm_here, tmp_path):
    """`--model simple`, to PyTorch and back."""
    import safetensors.torch

    from torch_reference.models.simple_unet import SimpleUNet

    result = jax_ddpm(*TRAIN, "--model", "simple", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = jax_ddpm_here("convert", "runs/digits", "w.safetensors", "--to", "torch", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    SimpleUNet(1).load_state_dict(safetensors.torch.load_file(tmp_path / "w.safetensors"))
    command = ["convert", "w.safetensors", "back", "--to", "run", "--image-size", "8"]
    assert jax_ddpm_here(*command, cwd=tmp_path).returncode == 0
    weights = (tmp_path / "runs/digits/checkpoints/00000060/ema.safetensors").read_bytes()
    assert (tmp_path / "back/checkpoints/00000000/ema.safetensors").read_bytes() == weights
    result = jax_ddpm_here("convert", "back", "d", "--to", "diffusers", cwd=tmp_path)
    assert result.returncode == 2 and "expected a UNet, got SimpleUNet" in result.stderr


@pytest.mark.slow
def test_every_flag_of_many_devices_at_once(tmp_path):
    """Split state, parts of batches, bfloat16, three steps a dispatch and one left over."""
    flags = ["--fsdp", "2", "--accumulate", "2", "--remat", "--dtype", "bfloat16"]
    flags += ["--steps", "4", "--steps-per-dispatch", "3", "--compilation-cache", "cache"]
    result = jax_ddpm("train", "--timesteps", "4", *flags, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    line = json.loads((tmp_path / "runs/digits/metrics.jsonl").read_text())
    assert line["step"] == 4 and np.isfinite(line["loss"])
    weights = load_file(tmp_path / "runs/digits/checkpoints/00000004/ema.safetensors")
    assert all(x.dtype == np.float32 for x in weights.values())


@pytest.mark.slow
def test_labels_of_ones_own_images(tmp_path):
    """Integers beside the images are classes; without them there are none."""
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 8, 3), np.uint8)
    np.savez(tmp_path / "mine.npz", pictures=images, kinds=np.arange(20) % 3)
    np.save(tmp_path / "plain.npy", images)
    for file, classes in (("mine.npz", 3), ("plain.npy", None)):
        options = ["--steps", "2", "--batch-size", "4", "--timesteps", "4"]
        result = jax_ddpm("train", "--data", file, *options, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        config = json.loads((tmp_path / "runs" / file[:-4] / "config.json").read_text())
        assert config["num_classes"] == classes


def test_a_missing_package_names_its_extra(tmp_path):
    code = "import sys; sys.modules['tyro'] = None\nfrom jax_ddpm.__main__ import main; main()"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith("jax-ddpm: this command needs tyro: pip install ")
    assert '"tyro>=1.0"' in result.stderr and len(result.stderr.splitlines()) == 1


def test_version(jax_ddpm_here, tmp_path):
    result = jax_ddpm_here("--version", cwd=tmp_path)
    assert result.stdout == f"jax_ddpm {jax_ddpm_version}, jax {jax.__version__}\n"
