"""`python -m benchmarks accelerator` on a CPU, in tiny sizes: what it says and leaves out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import accelerator, accelerator_parity, accelerator_speed, processes
from benchmarks.networks import specs
from torch_reference.models.simple_unet import SimpleUNet

pytestmark = [pytest.mark.usefixtures("defaults"), pytest.mark.slow]

ROOT = Path(__file__).parents[1]
BLOCKED = ("diffusers", "matplotlib", "PIL", "safetensors", "sklearn", "tqdm", "tyro")
SPEC = specs(tiny=True)["tutorial"]
RACE = accelerator_speed.Race("tutorial", "reverse loop", 2, "float32", compiled=False)


@pytest.mark.patience
def test_it_needs_no_other_packages(tmp_path):
    """All of it, in processes where `BLOCKED` are as good as not installed."""
    block = f"import sys; sys.modules.update(dict.fromkeys({BLOCKED}))"
    (tmp_path / "sitecustomize.py").write_text(block)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "benchmarks", "accelerator", "--tiny", "--out", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads((tmp_path / "accelerator-cpu.json").read_text())["rows"]
    assert {row["status"] for row in rows} == {"passed", "timed", "left out"}
    assert "- needs diffusers: UNet, Ho et al.'s: output, float32, float64\n" in result.stdout


def test_a_wrong_output_fails(monkeypatch, capsys, tmp_path):
    # Set before, so that what the command sets is taken back.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    networks = accelerator_parity._networks
    monkeypatch.setattr(accelerator_parity, "_networks", lambda *args: networks(*args)[:1])
    monkeypatch.setattr(accelerator_parity, "MATHS_CASES", ())
    monkeypatch.setattr(accelerator_parity, "LOSS_CASES", ())
    right = SimpleUNet.forward
    monkeypatch.setattr(SimpleUNet, "forward", lambda *args: 1.1 * right(*args))
    with pytest.raises(SystemExit) as end:
        accelerator.main(["parity", "--tiny", "--out", str(tmp_path)])
    rows = json.loads((tmp_path / "accelerator-cpu.json").read_text())["rows"]
    failed = [row["mode"] for row in rows if row["status"] == "failed"]
    assert (end.value.code, failed) == (1, ["float32", "float64", "bfloat16"])
    line = "| SimpleUNet: output | float32 | 1 | 9.1e-02 | 1e-05 | **failed** |"
    assert line in capsys.readouterr().out


def test_a_contender_that_differs_or_stops_is_not_timed(monkeypatch):
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
    expected = {"JAX": "failed", "torch eager": "timed"}
    assert status == expected | {"torch eager, channels_last": "out of memory"}


def test_a_resumed_training_that_differs_by_a_bit_is_seen():
    whole = {"a": np.array([1.0, np.nan], np.float32), "b": np.arange(3)}
    flipped = whole["a"].copy()
    flipped.view(np.uint32)[0] ^= 1
    assert processes.differing(dict(whole), whole) == []
    assert processes.differing({**whole, "a": flipped}, whole) == ["a"]
    assert processes.differing({"a": whole["a"]}, whole) == ["b"]
