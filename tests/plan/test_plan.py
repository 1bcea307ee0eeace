"""`jax-ddpm plan` as a user meets it, on a machine with neither TPU nor GPU."""

import json
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec

import pytest
from packaging.requirements import Requirement

from jax_ddpm.__main__ import main
from jax_ddpm.plan import measuring
from jax_ddpm.plan.measuring import planned, preset
from jax_ddpm.plan.targets import CHIPS, parse_target
from jax_ddpm.runs import Settings

needs_tpu = pytest.mark.skipif(not find_spec("libtpu"), reason="the extra plan is not installed")
needs_gpu = pytest.mark.skipif(
    not find_spec("jax_cuda13_plugin"), reason="the extra plan is not installed"
)
DIGITS = ["--model", "digits", "--steps", "20"]
TUTORIAL = ["--model", "simple", "--batch-size", "16"]
WITHOUT = """
import importlib.util as util, sys
find = util.find_spec
util.find_spec = lambda name, *a: None if name in {names} else find(name, *a)
sys.argv = ["jax-ddpm", *{arguments}]
from jax_ddpm.__main__ import main
main()
"""


def jax_ddpm(*arguments, cwd, without=()):
    """Run `jax-ddpm`; the plugin's own lines, which every `import jax` writes, are left out."""
    code = WITHOUT.format(names=set(without) or {""}, arguments=arguments)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )
    lines = result.stderr.splitlines(keepends=True)
    result.stderr = "".join(
        line for line in lines if "cuda drivers" not in line and "absl::Init" not in line
    )
    return result


@needs_tpu
def test_a_tpu_slice(tmp_path):
    """With libtpu alone, and no hardware: both programs, as text and as JSON."""
    cuda = {"jax_cuda12_plugin", "jax_cuda13_plugin"}
    result = jax_ddpm("plan", *DIGITS, "--json", "plan.json", cwd=tmp_path, without=cuda)
    assert (result.returncode, result.stderr) == (0, "")
    assert "train on v5e:2x2, 4 devices: 128 images, 32 images per device" in result.stdout
    assert "sample on v5e:2x2, 4 devices: 256 images × 20 steps" in result.stdout
    assert re.search(r"fits +\d+\.\d MiB +of 15\.75 GiB per device", result.stdout)
    assert result.stdout.count("bound by") == 2
    train, sample = json.loads((tmp_path / "plan.json").read_text())
    assert train["fits"] and sample["fits"] and not sample["collectives"]
    assert train["estimate"] == max(train["seconds"].values())
    # The donated state is 4 copies of the weights, which tiles pad, and comes back in place.
    assert train["aliased"] > 4 * 4 * 702_753
    # Beside it are the ten batches of a dispatch, padded too.
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
    command = ["plan", *TUTORIAL, "--work", "train"]
    rows = []
    for options in ([], ["--fsdp", "4", "--accumulate", "2"]):
        result = jax_ddpm(*command, *options, "--json", "plan.json", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        rows += json.loads((tmp_path / "plan.json").read_text())
    whole, split = rows
    (reduced,) = whole["collectives"]  # the gradient, and the loss
    assert (reduced["kind"], reduced["nbytes"]) == ("all-reduce", 4 * (151_427 + 1))
    assert split["flops"] == pytest.approx(whole["flops"], rel=1e-3)
    assert split["aliased"] < 0.6 * whole["aliased"]  # tiles pad what is small
    gathered = {each["kind"]: each["nbytes"] for each in split["collectives"]}
    assert gathered["all-gather"] > 0.9 * 4 * 151_427


@needs_tpu
def test_an_absurd_batch_does_not_fit(tmp_path):
    command = ["plan", "--work", "sample", "--target", "v5e:1x1", "--model", "digits"]
    result = jax_ddpm(*command, "--num", "8388608", "--steps", "2", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "")
    assert re.search(
        r"does not fit +[\d.]+ GiB +of 15\.75 GiB per device: [\d.]+ GiB too much", result.stdout
    )
    # The compiler's limit is the one that is judged by.
    assert "exceeds available HBM (15.75G)." in result.stdout.splitlines()[-1]


@needs_gpu
def test_a_gpu(tmp_path):
    command = ["plan", *TUTORIAL, "--target", "h100", "--dtype", "bfloat16"]
    options = ["--num", "8", "--steps", "20", "--json", "p.json"]
    result = jax_ddpm(*command, *options, cwd=tmp_path, without=["libtpu"])
    assert (result.returncode, result.stderr) == (0, "")
    assert "train on h100:1, 1 device: 16 images\n" in result.stdout
    train, sample = json.loads((tmp_path / "p.json").read_text())
    assert train["available"] == int(0.75 * CHIPS["h100"].memory)
    # Twice as much again for the gradient, but for that of the images.
    forward = sample["flops"] / (8 * 20)
    assert 2.9 * forward < train["flops"] / 16 < 3 * forward
    assert sample["traffic"] > 20 * 4 * 151_427


@needs_gpu
def test_fsdp_scatters_the_gradient(tmp_path):
    """What is gathered for the network comes back scattered, and no gradient is summed whole."""
    command = ["plan", *TUTORIAL, "--work", "train", "--target", "h100:4", "--fsdp", "4"]
    result = jax_ddpm(*command, "--json", "plan.json", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    (row,) = json.loads((tmp_path / "plan.json").read_text())
    nbytes = {each["kind"]: each["nbytes"] for each in row["collectives"]}
    assert nbytes["reduce-scatter"] == nbytes["all-gather"] > 4 * 150_000
    assert nbytes["all-reduce"] < 100


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "v9"], "--target: expected one of v3:2x2, v4:2x2x1, v5e:2x2, "),
        (["--target", "h100:zero"], "--target: expected a shape such as h100:1, got h100:zero"),
        (["--target"], "--target: expected one or several, such as v5e:2x2 h100:8"),
        (["--batch-size", "0"], "--batch-size: expected more than 0, got 0"),
        (["--json", "no/where.json"], "--json: no such folder: no"),
    ],
)
def test_bad_input_is_one_line(jax_ddpm_here, tmp_path, arguments, words):
    result = jax_ddpm_here("plan", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


@needs_tpu
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "v5e:3x7"], "--target: v5e:3x7: its compiler refuses such a slice: INTERNAL"),
        (["--steps", "1001"], "--steps: expected at most 1000, the model's timesteps, got 1001"),
        (["--batch-size", "6"], "--batch-size: expected a multiple of 4, the devices of v5e:2x2"),
        (["--accumulate", "5"], "--accumulate: expected a divisor of --batch-size 128, got 5"),
        (["--fsdp", "3"], "--fsdp: expected a divisor of 4, the devices of v5e:2x2, got 3"),
    ],
)
def test_what_the_target_refuses_is_one_line(tmp_path, arguments, words):
    result = jax_ddpm("plan", *arguments, cwd=tmp_path)
    assert result.returncode == 2 and words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(("target", "package"), [("v5e", "libtpu"), ("h100", "jax_cuda13_plugin")])
def test_a_missing_compiler_names_what_to_install(monkeypatch, capsys, target, package):
    monkeypatch.setattr("jax_ddpm.plan.targets.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["jax-ddpm", "plan", "--target", target])
    with pytest.raises(SystemExit) as end:
        main()
    line, _, packages = capsys.readouterr().err.partition(" pip install ")
    assert (end.value.code, line) == (2, f"jax-ddpm: this command needs {package}:")
    needed = [Requirement(each) for each in shlex.split(packages)]
    assert Requirement("jax[tpu,cuda13-local]>=0.10") in needed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("h100:9", "expected at most 8 chips, those of one host: .*, got h100:9"),
        ("v4:32x32x32", "expected at most 4,096 chips, those of one pod, got v4:32x32x32"),
        ("v5litepod-4", r"v5e:4x4 \(a TPU's chips\) or h100:8 \(GPUs\), got v5litepod-4"),
    ],
)
def test_targets_that_nobody_has(text, words):
    with pytest.raises(ValueError, match=words):
        parse_target(text)


@pytest.mark.parametrize(
    ("limit", "line"),
    [
        (1000, "980   fit, in 98 % of the memory; more were not tried"),
        (100, "96   fit, in 96 % of the memory; 128 do not fit"),
        (2, "0   8 do not fit"),
    ],
)
def test_what_the_search_says(monkeypatch, limit, line):
    """On a device of `limit` bytes where an image takes one."""

    def measured(run, settings, target):
        batch = settings.batch_size
        fits = batch <= limit
        row = {"fits": fits, "needed": batch if fits else None, "available": limit}
        return {"target": "v5e:2x2", "devices": 4, "work": "train", "images": batch, **row}

    monkeypatch.setattr(measuring, "measure_training", measured)
    settings, target = Settings(batch_size=128), parse_target("v5e")
    run = planned(preset("simple"), dtype="float32", remat=False)
    first = measured(run, settings, target)
    tried = []
    found, text = measuring.largest_training(run, settings, target, first, tried.append)
    assert text.endswith(line) and tried
    assert [each["images"] for each in found] == [n for n in first["largest_batch"][:1] if n]


@pytest.mark.parametrize("name", CHIPS)
def test_the_table_of_chips(name):
    """A product of float32 is never faster, and a device is a chip or half of one."""
    target = parse_target(name.upper())
    assert target.name == f"{name}:{target.chip.default_shape}"
    single, half = target.rates("float32"), target.rates("bfloat16")
    assert single["compute"] <= half["compute"]
    assert 50e12 < half["compute"] < 3e15 and 2e11 < half["memory"] < 1e13
    assert 10 * 2**30 < target.memory < 200 * 2**30
