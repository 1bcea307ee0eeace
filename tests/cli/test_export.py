"""The exported sampler: the library's own pictures, to the bit, from a file that knows it not."""

import hashlib
import json
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm.__main__ import main
from jax_ddpm.cli import run as jax_ddpm
from jax_ddpm.interop import save_diffusers

pytestmark = pytest.mark.usefixtures("defaults")

UNET = ddpm.UNet(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    down_block_types=("AttnDownBlock2D",),
    up_block_types=("UpBlock2D",),
    mid_block_type=None,
    layers_per_block=1,
    norm_num_groups=4,
    time_embedding_dim=512,
    num_class_embeds=11,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, defaults, write_run):
    """Runs with classes and without, and the sampler of the first, exported."""
    folder = tmp_path_factory.mktemp("export")
    labelled = write_run(folder / "digits", UNET, num_classes=10)
    write_run(folder / "simple", ddpm.SimpleUNet(channels=1))
    save_diffusers(folder / "diffusers", labelled.pretrained)
    export(folder, "--run", "digits", "--out", "digits.jaxexport")
    return folder


def export(folder, *arguments):
    with pytest.MonkeyPatch.context() as here:
        here.chdir(folder)
        jax_ddpm(["export", "--steps", "4", *arguments])


def load(path):
    return jax.export.deserialize(bytearray(path.read_bytes()))


@partial(jax.jit, static_argnames=("model", "num", "sampler", "first_sample"))
def library(weights, model, num, labels, sampler, first_sample=0):
    """The pictures of key 7, from the functions that the other tests hold to PyTorch."""
    if labels is None:
        denoise_fn = partial(model.apply, weights)
    else:
        denoise_fn = ddpm.classifier_free_guidance(
            lambda x_t, t: model.apply(weights, x_t, t, labels),
            lambda x_t, t: model.apply(weights, x_t, t, jnp.full_like(labels, 10)),
            scale=2.0,
        )
    betas = ddpm.cosine_beta_schedule(20)
    return ddpm.p_sample_loop(
        jax.random.key(7),
        ddpm.respace(ddpm.make_schedule(betas), [4, 9, 14, 19]),
        denoise_fn,
        (num, 8, 8, 1),
        sampler=sampler,
        first_sample=first_sample,
    )


def weights_of(folder):
    arrays = ddpm.io.arrays
    path = folder / "checkpoints/00000000/ema.safetensors"
    return arrays.unflatten(arrays.load_tensors(path))


DDIM, ANCESTRAL = ddpm.ddim(), ddpm.ancestral()


@pytest.mark.parametrize(("num", "first_sample"), [(2, 0), (5, 30)])
def test_one_file_draws_batches_of_any_size(folder, num, first_sample):
    labels = np.arange(num, dtype=np.int32)
    sampler = load(folder / "digits.jaxexport")
    images = sampler.call(jax.random.key(7), first_sample + jnp.arange(num), labels)
    weights = weights_of(folder / "digits")
    expected = library(weights, UNET, num, labels, DDIM, first_sample)
    np.testing.assert_array_equal(images, expected)
    assert np.std(expected) > 0.1


def test_a_model_without_classes_and_a_rule_that_draws(folder):
    export(
        folder, "--run", "simple", "--out", "simple.jaxexport", "--sampler", "ancestral",
        "--platforms", "cpu",
    )  # fmt: skip
    sampler = load(folder / "simple.jaxexport")
    assert sampler.platforms == ("cpu",)
    images = sampler.call(jax.random.key(7), jnp.arange(3))
    weights = weights_of(folder / "simple")
    expected = library(weights, ddpm.SimpleUNet(channels=1), 3, None, ANCESTRAL)
    np.testing.assert_array_equal(images, expected)


@pytest.mark.parametrize("sampler", ["dpm_solver_pp", "heun"])
def test_every_rule_can_be_exported(folder, sampler):
    export(folder, "--run", "digits", "--sampler", sampler, "--out", f"{sampler}.jaxexport")
    assert load(folder / f"{sampler}.jaxexport").platforms == ("cpu", "cuda", "tpu")


def test_it_runs_where_the_library_is_not_installed(folder):
    code = """if True:
        import sys

        for name in ("jax_ddpm", "flax", "optax", "jaxtyping", "safetensors"):
            sys.modules[name] = None
        import jax, numpy

        sampler = jax.export.deserialize(bytearray(open("digits.jaxexport", "rb").read()))
        numbers = jax.numpy.arange(2)
        numpy.save("images.npy", sampler.call(jax.random.key(7), numbers, numbers))
        """
    subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=True)
    labels = np.arange(2, dtype=np.int32)
    expected = library(weights_of(folder / "digits"), UNET, 2, labels, DDIM)
    np.testing.assert_array_equal(np.load(folder / "images.npy"), expected)


def test_the_manifest_is_true(folder):
    manifest = json.loads((folder / "digits.jaxexport.json").read_text())
    data = (folder / "digits.jaxexport").read_bytes()
    assert manifest["file"] == "digits.jaxexport" and manifest["bytes"] == len(data)
    assert manifest["sha256"] == hashlib.sha256(data).hexdigest()
    parameters = sum(x.size for x in jax.tree.leaves(weights_of(folder / "digits")))
    assert manifest["parameters"] == parameters
    assert 4 * parameters < len(data) < 4 * parameters + 200_000  # each weight once

    sampler = load(folder / "digits.jaxexport")
    assert manifest["platforms"] == list(sampler.platforms) == ["cpu", "cuda", "tpu"]
    assert manifest["calling_convention_version"] == sampler.calling_convention_version
    assert manifest["call"] == "call(key, samples, labels)"
    described = [*manifest["arguments"].values(), manifest["output"]]
    for said, is_ in zip(described, (*sampler.in_avals, *sampler.out_avals), strict=True):
        assert said["shape"] == [n if isinstance(n, int) else str(n) for n in is_.shape]
        assert said["dtype"] == str(is_.dtype)
    assert manifest["output"]["shape"] == ["batch", 8, 8, 1]
    assert (manifest["sampler"], manifest["steps"], manifest["guidance"]) == ("ddim", 4, 2.0)
    assert manifest["scheduler"]["num_train_timesteps"] == 20


def test_a_run_and_its_diffusers_folder_give_the_same_file(folder):
    same = ["--guidance", "3", "--spacing", "leading"]
    export(folder, "--run", "digits", "--out", "run.jaxexport", *same)
    export(folder, "--pretrained", "diffusers", "--out", "diffusers.jaxexport", *same)
    data = (folder / "run.jaxexport").read_bytes()
    assert (folder / "diffusers.jaxexport").read_bytes() == data
    assert b".py" not in data  # nor does it tell of the machine
    assert (folder / "digits.jaxexport").read_bytes() != data
    said = json.loads((folder / "diffusers.jaxexport.json").read_text())
    assert said["guidance"] == 3 and said["scheduler"]["timestep_spacing"] == "leading"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "expected --run or --pretrained, and one of them only"),
        (["--run", "nowhere"], "--run: expected a run's folder, got nowhere"),
        (["--pretrained", "digits"], "--pretrained: digits is a run, for --run"),
        (["--run", "digits", "--steps", "0"], "--steps: expected more than 0, got 0"),
        (["--run", "digits", "--steps", "21"], "--steps: expected at most 20, the model's"),
        (["--run", "simple", "--guidance", "3"], "--guidance: the model has no classes"),
        (["--run", "digits", "--platforms"], "--platforms: expected at least one, got none"),
        (["--run", "digits", "--out", "x.npz"], "--out: expected a .jaxexport, got x.npz"),
        (["--run", "digits", "--out", "digits"], "--out: expected a .jaxexport, got digits"),
        (["--run", "digits", "--out", "no/x.jaxexport"], "--out: no such folder: no"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder, capsys, arguments, words):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        export(folder, "--out", "digits.jaxexport", *arguments)
    said = capsys.readouterr().err
    assert stop.value.code == 2 and words in said and len(said.strip().splitlines()) == 1
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_without_flatbuffers_the_extra_is_named(folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    monkeypatch.setattr(sys, "argv", ["jax-ddpm", "export", "--run", str(folder / "digits")])
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jax-ddpm: this command needs flatbuffers: pip install ")
    assert '"flatbuffers>=24.3"' in line
    assert not (folder / "sampler.jaxexport").exists()
