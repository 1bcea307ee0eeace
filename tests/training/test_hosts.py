"""Real processes on loopback compute what one computes, and one of them writes."""

import hashlib
import json
import runpy
import signal
import socket
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_ddpm.runs import read_metrics
from jax_ddpm.training import hosts
from jax_ddpm.training.sharding import device_mesh

WORKER = str(Path(__file__).with_name("worker.py"))
COMMAND = ("-m", "jax_ddpm")
NAMES = ("one", "two")


@pytest.fixture
def ended(start):
    """Run commands at the same time: the exit codes, and what they said."""

    def run(*commands, **options):
        started = [start(*command, **options) for command in commands]
        return [each.end() for each in started], [each.text for each in started]

    return run


def on_two_hosts(*command):
    """The command of each of two processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{listener.getsockname()[1]}"
    flags = ("--coordinator", coordinator, "--num-processes", "2", "--process-id")
    return [(*command, *flags, str(k)) for k in range(2)]


@pytest.mark.parametrize("fsdp", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_losses_weights_and_pictures_do_not_depend_on_the_hosts(ended, tmp_path, fsdp):
    """Two with two devices each. One writes, is heard by both, and where one fails all do."""
    alone = runpy.run_path(WORKER)["train_and_sample"](device_mesh(1))
    codes, outputs = ended(*on_two_hosts(WORKER, str(fsdp)))
    assert codes == [0, 0], outputs
    assert [path.name for path in tmp_path.glob("results*")] == ["results-0.npz"]
    together = dict(np.load(tmp_path / "results-0.npz"))
    assert together.keys() == alone.keys()
    # The values are of order 1.
    for name, value in alone.items():
        if name != "bytes_here":
            np.testing.assert_allclose(together[name], value, rtol=0, atol=1e-9, err_msg=name)
    assert together["bytes_here"] <= alone["bytes_here"] * (0.3 if fsdp == 4 else 1)
    told = hashlib.sha256(np.random.default_rng(0).bytes(2**24 + 3)).hexdigest()
    for output, failure in zip(outputs, ("PartnerFailed", "ZeroDivisionError"), strict=True):
        assert json.dumps({"told": told, "failure": failure}) in output.splitlines()


@pytest.fixture
def data(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (16, 4, 4), np.uint8)
    np.savez(tmp_path / "x.npz", images=images, labels=np.arange(16) % 3)


@pytest.mark.patience
def test_the_command_runs_on_two_hosts(ended, data, tmp_path):
    """Each with two devices: the metrics of one process with one device, and its pictures."""
    train = "train --data x.npz --batch-size 8 --steps 4 --timesteps 8 --name NAME"
    train += " --unet.block-out-channels=8 --unet.norm-num-groups=4 --unet.mid-block-type=none"
    train += " --unet.down-block-types=DownBlock2D --unet.up-block-types=UpBlock2D"
    runs = tmp_path / "runs"

    def both(command):
        """On one device, as NAME "one", and on four of two hosts; what the first of them says."""
        one, two = ((*COMMAND, *command.replace("NAME", name).split()) for name in NAMES)
        assert ended(one, devices=1)[0] == [0]
        codes, (first, second) = ended(*on_two_hosts(*two))
        assert codes == [0, 0] and "wrote" not in second, first + second
        return first

    said = both(train)
    assert "4 cpu devices" in said and "wrote runs/two/" in said
    losses = [read_metrics(runs / name / "metrics.jsonl")[-1]["loss"] for name in NAMES]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    both("sample --steps 4 --num 6 --run runs/one --out NAME.npz")
    one, two = (np.load(tmp_path / f"{name}.npz")["samples"] for name in NAMES)
    np.testing.assert_allclose(two, one, atol=1e-4)

    # Both resume from their checkpoints: the same weights again.
    assert "resuming from step 4" in both(f"{train} --steps 6")
    last = "checkpoints/00000006/params.safetensors"
    one, two = (load_file(runs / name / last) for name in NAMES)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4), two, one)


@pytest.mark.patience
def test_asked_to_stop_two_hosts_save_and_resume(start, data, tmp_path):
    """SIGTERM to both, as schedulers send it; they agree on the step, and one of them saves."""
    train = "train --data x.npz --batch-size 8 --model simple --steps 30000 --timesteps 4".split()
    metrics, reached = tmp_path / "runs/x/metrics.jsonl", 0
    for _ in range(2):
        first, second = (start(*each, devices=1) for each in on_two_hosts(*COMMAND, *train))
        first.until(lambda more=reached: len(read_metrics(metrics)) > more)
        second.send_signal(signal.SIGTERM)
        assert (first.end(signal.SIGTERM), second.end()) == (130, 130), first.text + second.text
        step = int(max((tmp_path / "runs/x/checkpoints").iterdir()).name)
        assert f"stopped at step {step:,} and saved" in first.text
        assert step % 50 == 0 and step > 50 * reached
        reached = step // 50
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(50, step + 50, 50))


@pytest.mark.slow
def test_what_is_wrong_in_one_process_stops_all(ended, data):
    """Only the second finds no images: both end at once, each with a line."""
    first, second = on_two_hosts(*COMMAND, "train", "--batch-size", "4")
    commands = (*first, "--data", "x.npz"), (*second, "--data", "y.npz")
    codes, (one, other) = ended(*commands, devices=1)
    assert codes == [2, 2], one + other
    assert "another process failed" in one and "--data: no such file or folder: y.npz" in other


def test_launchers_that_start_several_are_joined(monkeypatch):
    initialize = Mock()
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    for name, number, calls in (
        ("SLURM_STEP_NUM_TASKS", "1", []),
        ("OMPI_COMM_WORLD_SIZE", "2", [call(None, None, None)]),
    ):
        monkeypatch.setenv(name, number)
        hosts.connect()
        assert initialize.call_args_list == calls
    initialize.side_effect = ValueError("JAX's words\nand more")
    with pytest.raises(ValueError, match="^coordinator, num_processes, process_id: JAX's words$"):
        hosts.connect(num_processes=2)


@pytest.mark.parametrize(("vendor", "launched"), [("0x1ae0\n", True), ("0x10de\n", False)])
def test_a_gpu_that_vfio_passes_through_is_no_tpu(monkeypatch, tmp_path, vendor, launched):
    """Also where libtpu is installed."""
    (tmp_path / "0000:00:05.0").mkdir()
    (tmp_path / "0000:00:05.0/vendor").write_text(vendor)
    initialize = Mock()
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(hosts, "find_spec", lambda name: name)
    monkeypatch.setattr(hosts, "_VFIO", tmp_path)
    monkeypatch.setattr(hosts, "_PCI", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    hosts.connect()
    assert initialize.called == launched
