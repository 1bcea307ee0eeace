"""`python -m benchmarks accelerator` on a CPU, in tiny sizes: what it says and leaves out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import accelerator, accelerator_parity, accelerator_speed, networks, processes
from benchmarks.accelerator import markdown
from benchmarks.accelerator_speed import chip_of, estimate
from benchmarks.harness import attempt
from benchmarks.networks import specs
from torch_reference.models.simple_unet import SimpleUNet

pytestmark = pytest.mark.usefixtures("defaults")

ROOT = Path(__file__).parents[1]
BLOCKED = ("diffusers", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm", "tyro")
BLOCK = f"""
# As if they were not installed: an import raises ModuleNotFoundError, and nothing finds them.
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec

def find_others(name, path=None, target=None):
    return None if name.partition(".")[0] in {BLOCKED} else find_spec(name, path, target)

PathFinder.find_spec = find_others
"""
SPEC = specs(tiny=True)["tutorial"]
RACE = accelerator_speed.Race("tutorial", "reverse loop", 2, "float32", compiled=False)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """The command in this process: exit code, record, what it printed."""

    def run_here(*arguments):
        # Set before, so that what the command sets is taken back.
        monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
        with pytest.raises(SystemExit) as end:
            accelerator.main([*arguments, "--tiny", "--out", str(tmp_path)])
        record = json.loads((tmp_path / "accelerator-cpu.json").read_text())
        return end.value.code, record, capsys.readouterr().out

    return run_here


def _without(tmp_path, *arguments):
    """The command in a new process, and in those that it starts, without `BLOCKED`."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "benchmarks", "accelerator", *arguments, "--tiny"]
    result = subprocess.run(
        [*command, "--out", str(tmp_path)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads((tmp_path / "accelerator-cpu.json").read_text())["rows"], result.stdout


def test_it_needs_no_other_packages(tmp_path):
    """Every module is imported, whatever the parts."""
    rows, text = _without(tmp_path, "resume")
    [resumed] = [row for row in rows if row["part"] == "resume"]
    assert (resumed["status"], resumed["differing"]) == ("passed", [])
    assert resumed["saved_with"] == ".npz, since safetensors is missing"
    assert "- not asked for: parity; attention; tutorial; ddpm_cifar10" in text


@pytest.mark.slow
def test_all_of_it_needs_no_other_packages(tmp_path):
    rows, text = _without(tmp_path)
    assert {row["status"] for row in rows} == {"passed", "timed", "left out"}
    assert "- needs diffusers: UNet, Ho et al.'s: output, float32, float64\n" in text
    assert "- needs diffusers, small UNet, torch eager: reverse loop, 2, bfloat16; " in text


def test_parity_is_found_and_a_wrong_output_fails(run, monkeypatch):
    networks = accelerator_parity._networks
    monkeypatch.setattr(accelerator_parity, "_networks", lambda *args: networks(*args)[:1])
    monkeypatch.setattr(accelerator_parity, "available", lambda package: package != "diffusers")
    code, record, text = run("parity")
    rows = [row for row in record["rows"] if "error" in row]
    assert code == 0
    assert {row["mode"] for row in rows} == {"float32", "float64", "bfloat16"}
    assert all(row["status"] == "passed" and row["error"] <= row["tolerance"] for row in rows)
    assert "- needs diffusers: UNet, Ho et al.'s: output, float32, float64" in text
    assert "- by default a CPU computes float32 in full: networks, TF32" in text

    monkeypatch.setattr(accelerator_parity, "MATHS_CASES", ())
    monkeypatch.setattr(accelerator_parity, "LOSS_CASES", ())
    right = SimpleUNet.forward
    monkeypatch.setattr(SimpleUNet, "forward", lambda *args: 1.1 * right(*args))
    code, record, text = run("parity")
    failed = [row for row in record["rows"] if row["status"] == "failed"]
    assert code == 1
    assert [row["mode"] for row in failed] == ["float32", "float64", "bfloat16"]
    assert "| SimpleUNet: output | float32 | 1 | 9.1e-02 | 1e-05 | **failed** |" in text


def test_attention_is_found_and_a_wrong_output_fails(run, monkeypatch):
    code, record, text = run("attention")
    rows = [row for row in record["rows"] if "error" in row]
    assert code == 0
    assert [row["mode"] for row in rows] == ["float32", "float64", "bfloat16"]
    assert {row["status"] for row in rows} == {"passed"}

    right = accelerator_parity.dot_product_attention
    wrong = lambda *inputs, precision: right(*inputs, precision=precision) * 1.1  # noqa: E731
    monkeypatch.setattr(accelerator_parity, "dot_product_attention", wrong)
    code, record, text = run("attention")
    assert code == 1
    assert (
        "| attention: output and gradients | float64 | 1 | 1.0e-01 | 1e-13 | **failed** |" in text
    )


def test_parts_that_are_not_asked_for_stay(run, monkeypatch):
    """Nor what there is no time for. What is done is kept if the next thing stops all. A record of
    other versions is replaced."""

    def row(status):
        return [{"part": "resume", "name": "N", "status": status, "problem": "P"}]

    monkeypatch.setattr(processes, "check_resuming", lambda **_: row("failed"))
    run("resume")
    monkeypatch.setattr(accelerator_parity, "attention", lambda **_: [])
    _, record, text = run("attention")
    assert [row["problem"] for row in record["rows"] if row["part"] == "resume"] == ["P"]
    assert "- not asked for: parity; tutorial; ddpm_cifar10" in text

    def stop(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(processes, "check_resuming", lambda **_: row("passed"))
    monkeypatch.setattr(accelerator_parity, "attention", stop)
    with pytest.raises(KeyboardInterrupt):
        run("resume", "attention")
    monkeypatch.setattr(accelerator_parity, "attention", lambda **_: [])
    _, record, _ = run("attention")
    assert [row["status"] for row in record["rows"] if row["part"] == "resume"] == ["passed"]

    run("resume", "--budget", "0")  # no time to measure it again
    _, record, _ = run("attention")
    assert [row["status"] for row in record["rows"] if row["part"] == "resume"] == ["passed"]

    monkeypatch.setattr(accelerator, "PRECISION", "another")
    _, record, _ = run("attention")
    problems = [row["problem"] for row in record["rows"] if row["part"] == "resume"]
    assert problems == ["not asked for"]


def test_gradients_in_reduced_precision_are_one_vector_whatever_their_order():
    one, other = {"a": np.ones(2), "b": np.zeros((1, 1))}, {"b": np.zeros((1, 1)), "a": np.ones(2)}
    vectors = map(accelerator_parity.vector, (one, other))
    np.testing.assert_array_equal(next(vectors), next(vectors))


def test_what_a_backend_lacks_is_named():
    found, missing = accelerator_parity.modes("tpu")
    assert "float64" not in [mode.name for mode in found]
    assert missing[0]["problem"] == "a TPU has no float64"
    found, missing = accelerator_parity.modes("gpu")
    assert [mode.name for mode in found] == ["float32", "float64", "TF32", "bfloat16"]
    assert missing == []


@pytest.mark.parametrize("arithmetic", ["float32", "bfloat16"])
@pytest.mark.parametrize("work", ["reverse loop", "training step"])
def test_a_race(work, arithmetic):
    race = RACE._replace(work=work, arithmetic=arithmetic)
    rows = accelerator_speed.run(race, SPEC, rounds=2, least=0.0)
    names = ["JAX", "torch eager", "torch eager, channels_last"]
    assert [row["contender"] for row in rows] == names
    assert [row["status"] for row in rows] == ["timed"] * 3
    assert [len(row["seconds_per_step"]) for row in rows] == [2] * 3
    assert rows[0]["difference"] <= rows[0]["tolerance"]
    assert rows[0]["estimate"]["flops"] > 0
    assert rows[0]["estimate"]["why"] == "plan has no figures of 'cpu'"


def test_without_its_package_torch_is_left_out_by_name(monkeypatch):
    """And JAX is timed alone; against torch.compile nothing is left to race."""
    monkeypatch.setattr(networks, "available", lambda package: False)
    spec = specs(tiny=True)["ddpm_cifar10"]
    race = RACE._replace(part="ddpm_cifar10")
    missing, alone = accelerator_speed.run(race, spec, rounds=1, least=0.0)
    assert (missing["contender"], missing["problem"]) == ("torch eager", "needs diffusers")
    assert (alone["contender"], alone["status"]) == ("JAX", "timed")
    [missing] = accelerator_speed.run(race._replace(compiled=True), spec, rounds=1, least=0.0)
    assert (missing["contender"], missing["status"]) == ("torch.compile", "left out")


def test_a_contender_that_differs_or_stops_is_not_timed(monkeypatch):
    """And the others are."""
    jax_loop, torch_loop = accelerator_speed._jax_loop, accelerator_speed._torch_loop

    def wrong(race, spec):
        contender = jax_loop(race, spec)
        return contender._replace(output=1.01 * contender.output)

    def full(race, spec, channels_last, wrap):
        if channels_last:
            raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB")
        return torch_loop(race, spec, channels_last, wrap)

    monkeypatch.setattr(accelerator_speed, "_jax_loop", wrong)
    monkeypatch.setattr(accelerator_speed, "_torch_loop", full)
    rows = accelerator_speed.run(RACE, SPEC, rounds=1, least=0.0)
    status = {row["contender"]: row["status"] for row in rows}
    assert status == {
        "JAX": "failed",
        "torch eager": "timed",
        "torch eager, channels_last": "out of memory",
    }
    said = {row["contender"]: row.get("problem") for row in rows}
    assert "differs from torch eager by 1.0e-02, allowed 1e-03" in said["JAX"]


def test_memory_that_ends_while_timing_is_a_row(monkeypatch):
    def breaks(race, spec, channels_last, wrap):
        def run(count):
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

        return accelerator_speed.Contender(
            run, 3, accelerator_speed._jax_loop(race, spec).output, {}
        )

    monkeypatch.setattr(accelerator_speed, "_torch_loop", breaks)
    rows = accelerator_speed.run(RACE, SPEC, rounds=1, least=0.0)
    assert [row["status"] for row in rows] == ["out of memory", "out of memory", "timed"]


def test_an_error_is_a_row_and_the_exit_code(run, monkeypatch):
    def stops(*_, **__):
        raise ValueError("something is wrong\nwith details")

    monkeypatch.setattr(processes, "check_resuming", stops)
    code, record, text = run("resume")
    assert code == 1
    assert record["rows"][0]["status"] == "failed"
    assert "- ValueError: something is wrong: training, saved and resumed" in text
    assert attempt({}, stops)[0]["problem"] == "ValueError: something is wrong"


def test_without_time_everything_is_left_out_by_name(run):
    code, record, text = run("--budget", "0")
    assert code == 0
    assert {row["status"] for row in record["rows"]} == {"left out"}
    assert "- no time left: training, saved and resumed; SimpleUNet: output, float32;" in text
    assert "- no time left, small UNet, torch eager: reverse loop, 2, bfloat16;" in text


def test_the_clock_foresees_what_takes_long():
    now = [0.0]
    clock = accelerator.Clock(100, now=lambda: now[0])

    def work(seconds):
        now[0] += seconds
        return []

    assert clock.allows("short")
    clock.time("short", lambda: work(5))
    clock.time("long", lambda: work(60))  # 65 in all
    assert clock.allows("short")
    assert not clock.allows("long")
    assert not clock.allows("new")  # as long as the longest, until it is known
    clock.time("short", lambda: work(31))
    assert not clock.allows("short")


def test_the_most_telling_races_come_first():
    races = accelerator_speed.schedule_of_races("gpu", (128, 16, 512))
    assert len(set(races)) == len(races) == 2 * 2 * 2 * 3 * 2 + 4
    assert [race.compiled for race in races[:8]] == [False] * 8
    assert {(race.part, race.batch) for race in races[:8]} == {
        ("tutorial", 128),
        ("ddpm_cifar10", 128),
    }
    for name in ("tutorial", "ddpm_cifar10"):
        for batch in (128, 16, 512):
            here = [race for race in races if (race.part, race.batch) == (name, batch)]
            compiled = [race.compiled for race in here if race.arithmetic != "TF32"]
            assert compiled == sorted(compiled)
    assert not any(
        race.arithmetic == "TF32" for race in accelerator_speed.schedule_of_races("tpu", (128,))
    )


def test_resuming_notices_a_bit():
    whole = {"a": np.array([1.0, np.nan], np.float32), "b": np.arange(3)}
    assert processes.differing(dict(whole), whole) == []
    flipped = whole["a"].copy()
    flipped.view(np.uint32)[0] ^= 1
    assert processes.differing({**whole, "a": flipped}, whole) == ["a"]
    assert processes.differing({**whole, "a": whole["a"] * np.float64(1)}, whole) == ["a"]
    assert processes.differing({"a": whole["a"]}, whole) == ["b"]


def test_a_resumed_training_that_differs_fails(monkeypatch):
    said = {"backend": "gpu", "network": "N", "steps": 2, "saved_with": "S"}
    given = []

    def child(what, *arguments, flags="", timeout):
        given.append(flags)
        if what != "backend":
            part, folder, size = arguments
            assert (what, size) == ("resume", "tiny")
            np.savez(Path(folder) / f"{part}.npz", weights=np.full(2, part == "whole"))
        return {**said, "xla_flags": flags}

    monkeypatch.setattr(processes, "_new", child)
    [row] = processes.check_resuming(tiny=True)
    assert given == ["", *[processes.DETERMINISTIC] * 2]
    assert (row["status"], row["differing"]) == ("failed", ["weights"])
    assert row["problem"] == "1 of 1 arrays differ: weights"


def test_chips_are_matched_by_their_whole_name():
    assert chip_of("NVIDIA H100 80GB HBM3") == "h100"
    assert chip_of("TPU v5 lite") == "v5e"
    for other in ("NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB", "NVIDIA L40S", "cpu"):
        assert chip_of(other) is None


def test_an_estimate_is_the_longest_time_of_a_step():
    product = jax.jit(lambda x: x @ x).trace(np.zeros((256, 256), np.float32))
    compiled = product.lower().compile()
    figures = estimate("NVIDIA H100 80GB HBM3", product.jaxpr, compiled, "float32", 2)
    assert figures["flops"] == 256**3
    assert figures["products"] == "TF32"
    assert figures["bound"] == "memory"
    assert figures["seconds"] == pytest.approx(figures["traffic"] / 3352e9)


def test_the_record_as_markdown():
    labels = {**RACE.labels("SimpleUNet"), "status": "timed"}
    figures = {"seconds": 1e-3, "bound": "memory", "products": "TF32"}
    rows = [
        {**labels, "contender": "JAX", "seconds_per_step": [2e-3], "estimate": figures},
        {**labels, "contender": "torch eager", "seconds_per_step": [3e-3, 5e-3], "difference": 0},
    ]
    machine = {"date": "2026-01-01T00:00:00", "versions": {"jax": "1"}}
    record = {
        "machine": machine,
        "device_kind": "NVIDIA H100 80GB HBM3",
        "backend": "gpu",
        "precision": "",
        "rows": rows,
    }
    text = markdown(record)
    assert "| 2 | float32 | JAX | 2 (2 – 2) |  | 1 (memory, TF32) |" in text
    assert "| 2 | float32 | torch eager | 4 (3 – 5) | 2.00 |  |" in text
    assert accelerator.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_benchmarks_hand_over(monkeypatch):
    """Before they ask for packages that the accelerator does without."""
    from benchmarks import __main__

    handed = []
    monkeypatch.setattr(accelerator, "main", handed.append)
    monkeypatch.setattr(__main__, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "accelerator", "parity"])
    __main__.main()
    assert handed == [["parity"]]
