"""`python -m benchmarks accelerator` on a CPU, in tiny sizes."""

import json
import sys

import pytest

from benchmarks import accelerator
from torch_reference.models.simple_unet import SimpleUNet

pytestmark = [pytest.mark.usefixtures("defaults"), pytest.mark.slow]


@pytest.fixture
def record(monkeypatch, tmp_path):
    """Runs the command; its exit code and what it wrote."""
    # Set before, so that what the command sets is taken back.
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

    def run(*arguments):
        argv = ["accelerator", *arguments, "--tiny", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as end:
            accelerator.main()
        return end.value.code, json.loads((tmp_path / "accelerator-cpu.json").read_text())

    return run


@pytest.mark.patience
def test_everything(record, monkeypatch):
    """All of it; without diffusers, whose parts are left out."""
    monkeypatch.setitem(sys.modules, "diffusers.models.unets.unet_2d", None)
    monkeypatch.delitem(sys.modules, "jax_ddpm.parity.unet", raising=False)
    code, parts = record("--target", "h200")
    rows = {part: parts[part] for part in accelerator.PARTS}
    assert not code and rows["resume"][0]["status"] == "passed"
    assert {row["status"] for row in rows["ddpm_cifar10"]} == {"left out"}
    assert {row["status"] for row in rows["tutorial"]} == {"timed"}
    left = [row["name"] for row in rows["parity"] if row["status"] != "passed"]
    assert left == ["UNet, Ho et al.'s: output"] * 2


def test_a_wrong_output_fails_and_is_not_timed(record, monkeypatch, capsys):
    right = SimpleUNet.forward
    monkeypatch.setattr(SimpleUNet, "forward", lambda *args: 1.1 * right(*args))
    code, parts = record("tutorial", "--arithmetic", "float32")
    assert code and {row["status"] for row in parts["tutorial"]} == {"failed"}
    assert "ValueError: expected outputs within 1e-03 of torch eager's" in capsys.readouterr().out
