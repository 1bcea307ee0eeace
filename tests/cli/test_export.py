"""The exported sampler: the library's own pictures, to the bit, from a file that knows it not."""

import hashlib
import json
import subprocess
import sys
from contextlib import chdir

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm
from jax_ddpm import runs
from jax_ddpm.cli import run as jax_ddpm
from jax_ddpm.interop import save_diffusers
from jax_ddpm.runs.programs import guided_denoise_fn


@pytest.fixture(scope="module")
def folder(tmp_path_factory, defaults, write_run, small_unet):
    """Runs with classes and without, and the sampler of the first, exported."""
    folder = tmp_path_factory.mktemp("export")
    attention = small_unet.clone(down_block_types=("AttnDownBlock2D",))
    for name, *network in (("digits", attention, 10), ("simple", ddpm.SimpleUNet(channels=1))):
        run = write_run(folder / "written" / name, *network)
        small = jax.tree.map(lambda x: 0.3 * x, run.variables)  # or all pixels are ±1
        changed = run._replace(variables=small, prediction_type="v_prediction")
        runs.save_run(folder / name, changed)
    save_diffusers(folder / "diffusers", runs.load_run(folder / "digits"))
    export(folder, "--run", "digits", "--out", "digits.jaxexport")
    return folder


def export(folder, *arguments):
    with chdir(folder):
        jax_ddpm(["export", "--steps", "2", *arguments])


def library(folder, num, sampler, first_sample=0):
    """The pictures of key 7, by functions that have tests of their own. Labels: 0, 1, 2, …"""
    run, schedule = runs.load_run(folder), ddpm.make_schedule(ddpm.cosine_beta_schedule(20))
    labels = None if run.num_classes is None else jnp.arange(num)

    @jax.jit
    def draw(variables):
        chain = ddpm.respace(schedule, [9, 19]), guided_denoise_fn(run, variables, labels)
        policy = {"sampler": sampler, "prediction_type": "v_prediction"}
        policy |= {"first_sample": first_sample}
        return ddpm.p_sample_loop(jax.random.key(7), *chain, (num, 8, 8, 1), **policy)

    images = np.asarray(draw(run.variables))
    assert np.mean(np.abs(images) < 1) > 0.1 and np.std(images, axis=0).mean() > 1e-3
    return images


def test_one_file_draws_batches_of_any_size_where_the_library_is_not_installed(folder):
    code = """if True:
        import sys
        for name in ("jax_ddpm", "flax", "optax", "jaxtyping", "safetensors"):
            sys.modules[name] = None
        import jax, numpy
        sampler = jax.export.deserialize(bytearray(open("digits.jaxexport", "rb").read()))
        for samples, labels in (([30, 31, 32, 33, 34], [0, 1, 2, 3, 4]), ([33, 31], [3, 1])):
            images = sampler.call(jax.random.key(7), numpy.array(samples), numpy.array(labels))
            numpy.save(f"images{len(samples)}.npy", images)
        """
    subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, check=True)
    expected = library(folder / "digits", 5, ddpm.ddim(), first_sample=30)
    np.testing.assert_array_equal(np.load(folder / "images5.npy"), expected)
    np.testing.assert_allclose(np.load(folder / "images2.npy"), expected[[3, 1]], atol=1e-5)


@pytest.mark.parametrize("rule", ["ancestral", "dpm_solver_pp", "heun"])
def test_every_rule_can_be_exported(folder, rule):
    """Of a model without classes."""
    export(folder, *f"--sampler {rule} --run simple --platforms cpu --out x.jaxexport".split())
    exported = jax.export.deserialize(bytearray((folder / "x.jaxexport").read_bytes()))
    assert exported.platforms == ("cpu",)
    images = exported.call(jax.random.key(7), jnp.arange(3))
    np.testing.assert_array_equal(images, library(folder / "simple", 3, getattr(ddpm, rule)()))


def test_the_manifest_is_true(folder):
    manifest = json.loads((folder / "digits.jaxexport.json").read_text())
    data = (folder / "digits.jaxexport").read_bytes()
    sampler = jax.export.deserialize(bytearray(data))
    numbers = sum(x.size for x in jax.tree.leaves(runs.load_run(folder / "digits").variables))
    expected = {"sampler": "ddim", "steps": 2, "guidance": 2.0, "parameters": numbers}
    expected |= {"call": "call(key, samples, labels)", "platforms": [*sampler.platforms]}
    expected["sha256"] = hashlib.sha256(data).hexdigest()
    assert manifest.items() >= expected.items() and len(sampler.platforms) == 3
    assert 4 * numbers < len(data) < 4 * numbers + 200_000, "once"
    assert len(manifest["arguments"]) == len(sampler.in_avals) == 3
    assert manifest["output"].startswith("float32 [batch, 8, 8, 1], ")
    assert manifest["scheduler"]["num_train_timesteps"] == 20


@pytest.mark.filterwarnings("ignore:guidance. the last label")
def test_a_run_and_its_diffusers_folder_give_the_same_file(folder):
    same = ["--guidance", "3", "--spacing", "leading", "--platforms", "cpu"]
    export(folder, "--run", "digits", "--out", "run.jaxexport", *same)
    export(folder, "--pretrained", "diffusers", "--out", "diffusers.jaxexport", *same)
    data = (folder / "run.jaxexport").read_bytes()
    assert (folder / "diffusers.jaxexport").read_bytes() == data
    assert b".py" not in data  # nor does it tell of the machine
    assert (folder / "digits.jaxexport").read_bytes() != data
    said = json.loads((folder / "diffusers.jaxexport.json").read_text())
    assert said["guidance"] == 3 and said["scheduler"]["timestep_spacing"] == "leading"
