"""`jax-ddpm plan` as a user meets it, on a machine with neither TPU nor GPU."""

import json
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec

import pytest

from jax_ddpm.__main__ import main
from jax_ddpm.plan import measuring
from jax_ddpm.plan.measuring import preset
from jax_ddpm.plan.targets import CHIPS, parse_target
from jax_ddpm.runs import Settings

needs_tpu = pytest.mark.skipif(not find_spec("libtpu"), reason="needs the extra plan")
needs_gpu = pytest.mark.skipif(not find_spec("jax_cuda13_plugin"), reason="needs the extra plan")
DIGITS = ["--model", "digits", "--steps", "20"]
TUTORIAL = ["--model", "simple", "--batch-size", "16"]
WITHOUT = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *a: None if name in {names} else find(name, *a)
from jax_ddpm.cli import run
run({arguments})
"""


def plan(*arguments, cwd, without=(), code=0):
    """`jax-ddpm plan`, and the rows of its --json; without the lines that plugins write."""
    arguments = ["plan", *arguments, "--json", "plan.json"]
    program = WITHOUT.format(names=set(without) or {""}, arguments=arguments)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    result.stderr = re.sub(r".*(cuda drivers|absl::Init).*\n", "", result.stderr)
    assert result.returncode == code and (code == 2 or not result.stderr), result.stderr
    return result, json.loads((cwd / "plan.json").read_text()) if code < 2 else []


@needs_tpu
def test_a_tpu_slice(tmp_path):
    """With libtpu alone, and no hardware: both programs, as text and as JSON."""
    cuda = {"jax_cuda12_plugin", "jax_cuda13_plugin"}
    result, (train, sample) = plan(*DIGITS, cwd=tmp_path, without=cuda)
    assert "train on v5e:2x2, 4 devices: 128 images, 32 images per device" in result.stdout
    assert "sample on v5e:2x2, 4 devices: 256 images × 20 steps" in result.stdout
    assert re.search(r"fits +\d+\.\d MiB +of 15\.75 GiB per device", result.stdout)
    assert train["fits"] and sample["fits"] and not sample["collectives"]
    assert train["estimate"] == max(train["seconds"].values())
    # The donated state is 4 copies of the weights, which tiles pad, and comes back in place;
    # beside it are the ten batches of a dispatch, padded too.
    assert train["aliased"] > 4 * 4 * 702_753
    assert train["arguments"] - train["aliased"] < 400_000
    # Forward, and twice as much for the gradient; in sampling, guidance runs the network twice.
    assert sample["flops"] / (64 * 20 * 2) == pytest.approx(train["flops"] / (32 * 3), rel=0.02)
    (reduced,) = train["collectives"]
    assert reduced["kind"] == "all-reduce"
    # XLA sums once what is one gradient: in each block, the biases of the time's projection and
    # of the first convolution; where there is one, those of the shortcut and of the second.
    shared = (32 + 5 * 64 + 2 * 32) + (3 * 64 + 2 * 32)
    assert reduced["nbytes"] == 4 * (702_753 + 1 - shared)


@needs_tpu
def test_fsdp_and_accumulation(tmp_path):
    """A quarter of the state on each device, and its weights gathered for each part."""
    command = [*TUTORIAL, "--work", "train"]
    _, (whole,) = plan(*command, cwd=tmp_path)
    _, (split,) = plan(*command, "--fsdp", "4", "--accumulate", "2", cwd=tmp_path)
    (reduced,) = whole["collectives"]  # the gradient, and the loss
    assert (reduced["kind"], reduced["nbytes"]) == ("all-reduce", 4 * (151_427 + 1))
    assert split["flops"] == pytest.approx(whole["flops"], rel=1e-3)
    assert split["aliased"] < 0.6 * whole["aliased"]  # tiles pad what is small
    gathered = {each["kind"]: each["nbytes"] for each in split["collectives"]}
    assert gathered["all-gather"] > 0.9 * 4 * 151_427


@needs_tpu
def test_an_absurd_batch_does_not_fit(tmp_path):
    command = [*DIGITS, "--work", "sample", "--target", "v5e:1x1", "--num", "8388608"]
    result, _ = plan(*command, cwd=tmp_path, code=1)
    words = r"does not fit +[\d.]+ GiB +of 15\.75 GiB per device: [\d.]+ GiB too much"
    assert re.search(words, result.stdout)
    # The compiler's limit is the one that is judged by.
    assert "exceeds available HBM (15.75G)." in result.stdout.splitlines()[-1]


@needs_gpu
def test_a_gpu(tmp_path):
    command = [*TUTORIAL, "--target", "h100", "--dtype", "bfloat16", "--num", "8"]
    result, (train, sample) = plan(*command, "--steps", "20", cwd=tmp_path, without=["libtpu"])
    assert "train on h100:1, 1 device: 16 images\n" in result.stdout
    assert train["available"] == int(0.75 * CHIPS["h100"].memory)
    # Twice as much again for the gradient, but for that of the images.
    forward = sample["flops"] / (8 * 20)
    assert 2.9 * forward < train["flops"] / 16 < 3 * forward
    assert sample["traffic"] > 20 * 4 * 151_427


@needs_gpu
def test_fsdp_scatters_the_gradient(tmp_path):
    """What is gathered for the network comes back scattered, and no gradient is summed whole."""
    command = [*TUTORIAL, "--work", "train", "--target", "h100:4", "--fsdp", "4"]
    _, (row,) = plan(*command, cwd=tmp_path)
    nbytes = {each["kind"]: each["nbytes"] for each in row["collectives"]}
    assert nbytes["reduce-scatter"] == nbytes["all-gather"] > 4 * 150_000
    assert nbytes["all-reduce"] < 100


def test_bad_input_is_one_line(jax_ddpm_here, tmp_path):
    for arguments, words in (
        ("--target", "--target: expected one or several, such as v5e:2x2 h100:8"),
        ("--target v9", "--target: expected one of v3:2x2, v4:2x2x1, v5e:2x2, "),
        ("--target h100:zero", "--target: expected a shape such as h100:1, got h100:zero"),
        ("--target h100:9", "--target: expected at most 8 chips, those of one host: "),
        ("--target v5e:1x64", "--target: expected sides of at most 16 chips, those of a pod"),
        ("--batch-size 0", "--batch-size: expected a whole number of 1 or more, got 0"),
    ):
        result = jax_ddpm_here("plan", *arguments.split(), cwd=tmp_path)
        assert result.returncode == 2 and words in result.stderr
        assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@needs_tpu
def test_a_slice_that_the_compiler_refuses_is_one_line(tmp_path):
    result, _ = plan("--target", "v5e:3x7", cwd=tmp_path, code=2)
    assert "--target: v5e:3x7: its compiler refuses such a slice: INTERNAL" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_missing_compiler_names_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr("jax_ddpm.plan.targets.find_spec", lambda name: None)
    for target, package in (("v5e", "libtpu"), ("h100", "jax_cuda13_plugin")):
        monkeypatch.setattr(sys, "argv", ["jax-ddpm", "plan", "--target", target])
        with pytest.raises(SystemExit) as end:
            main()
        said = f'jax-ddpm: this command needs {package}: pip install "jax_ddpm[plan]"\n'
        assert (end.value.code, capsys.readouterr().err) == (2, said)


def test_what_the_search_says(monkeypatch):
    """On a device of `limit` bytes where an image takes one."""

    def measured(limit, run, settings, target):
        images, fits = settings.batch_size, settings.batch_size <= limit
        row = {"images": images, "devices": 4, "available": limit, "fits": fits}
        return {**row, "needed": images if fits else None}

    arguments = preset("simple"), Settings(batch_size=128), parse_target("v5e")
    for limit, found, line in (
        (1000, [980], "980   fit, in 98 % of the memory; more were not tried"),
        (100, [96], "96   fit, in 96 % of the memory; 128 do not fit"),
        (2, [], "0   8 do not fit"),
    ):
        tried, measure = [], partial(measured, limit)
        monkeypatch.setattr(measuring, "measure_training", measure)
        rows, text = measuring.largest_training(*arguments, measure(*arguments), tried.append)
        assert text.endswith(line) and tried and [each["images"] for each in rows] == found


def test_the_table_of_chips():
    """A product of float32 is never faster, and a device is a chip or half of one."""
    for name, chip in CHIPS.items():
        target = parse_target(name.upper())
        assert target.name == f"{name}:{chip.default_shape}"
        single, half = target.rates("float32"), target.rates("bfloat16")
        assert single["compute"] <= half["compute"]
        assert 50e12 < half["compute"] < 3e15 and 2e11 < half["memory"] < 1e13
        assert 10 * 2**30 < target.memory < 200 * 2**30
