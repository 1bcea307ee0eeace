"""Real processes on loopback compute what one computes, and one of them writes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_ddpm.training.hosts import connect

WORKER = str(Path(__file__).with_name("worker.py"))


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def run_all(commands, cwd, **environment):
    """Run commands at the same time; their output, once all have ended."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=cwd,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for command in commands
    ]
    try:
        return [(*process.communicate(timeout=300), process.returncode) for process in processes]
    finally:
        for process in processes:
            process.kill()


def train(tmp_path, name, *, devices, fsdp=1, processes=1):
    arguments = [WORKER, f"{name}.npz", str(devices), str(fsdp)]
    commands = [arguments]
    if processes > 1:
        coordinator = f"127.0.0.1:{free_port()}"
        commands = [[*arguments, coordinator, str(processes), str(k)] for k in range(processes)]
    for _, stderr, code in run_all(commands, tmp_path):
        assert code == 0, stderr
    return dict(np.load(tmp_path / f"{name}.npz"))


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return train(tmp_path_factory.mktemp("alone"), "alone", devices=1)


@pytest.mark.parametrize(
    "layout",
    [
        {"devices": 8},
        {"devices": 2, "processes": 2},
        {"devices": 2, "processes": 2, "fsdp": 4},
    ],
    ids=lambda layout: ", ".join(f"{k} {v}" for k, v in layout.items()),
)
def test_losses_weights_and_pictures_do_not_depend_on_the_devices(tmp_path, alone, layout):
    together = train(tmp_path, "together", **layout)
    assert together.keys() == alone.keys()
    share = together.pop("bytes_here") / alone["bytes_here"]
    assert share == 1 if "fsdp" not in layout else share < 0.3
    for name, value in together.items():
        # Of order 1, all of them; a bias that a norm takes away again has no gradient.
        assert np.max(np.abs(value - alone[name])) < 1e-9, name


@pytest.mark.slow
def test_the_command_runs_on_two_hosts(tmp_path):
    """Each with two devices: the metrics of one process with one device, and its pictures."""
    train = ["-m", "jax_ddpm", "train", "--steps", "4", "--timesteps", "8", "--name"]
    sample = ["-m", "jax_ddpm", "sample", "--steps", "4", "--num", "6", "--run", "runs/one"]

    def both(*arguments):
        flags = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
        commands = [[*arguments, *flags, "--process-id", str(k)] for k in range(2)]
        return run_all(commands, tmp_path, JAX_NUM_CPU_DEVICES="2")

    for arguments in ([*train, "one"], [*sample, "--out", "one.npz"]):
        ((_, stderr, code),) = run_all([arguments], tmp_path, JAX_NUM_CPU_DEVICES="1")
        assert code == 0, stderr
    outputs = both(*train, "two") + both(*sample, "--out", "two.npz")
    assert [code for *_, code in outputs] == [0] * 4, outputs
    assert "4 cpu device(s)" in outputs[0][0] and "wrote runs/two/" in outputs[0][0]
    assert "wrote" not in outputs[1][0] + outputs[3][0]
    lines = [
        json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text())
        for name in ("one", "two")
    ]
    assert lines[1]["loss"] == pytest.approx(lines[0]["loss"], rel=1e-5)
    one, two = (np.load(tmp_path / f"{name}.npz")["samples"] for name in ("one", "two"))
    np.testing.assert_allclose(two, one, atol=1e-4)

    # Both resume from their checkpoints: the same weights again.
    more = ["--steps", "6", "--accept-changes"]
    ((_, stderr, code),) = run_all([[*train, "one", *more]], tmp_path, JAX_NUM_CPU_DEVICES="1")
    assert code == 0, stderr
    (out, error, code), (*_, other) = both(*train, "two", *more)
    assert (code, other) == (0, 0) and "resuming from step 4" in out, error
    one, two = (
        load_file(tmp_path / "runs" / name / "checkpoints/00000006/params.safetensors")
        for name in ("one", "two")
    )
    for name, value in one.items():
        np.testing.assert_allclose(two[name], value, atol=1e-4, err_msg=name)


@pytest.mark.slow
def test_asked_to_stop_two_hosts_save_and_go_on(tmp_path):
    """SIGTERM to both, as schedulers send it; they agree on the step, and one of them saves.

    With the pools of threads that the command itself asks for.
    """
    train = ["-m", "jax_ddpm", "train", "--model", "simple", "--steps", "3000", "--timesteps", "4"]
    metrics = tmp_path / "runs/digits/metrics.jsonl"
    environment = dict(os.environ)

    def start():
        together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
        return [
            subprocess.Popen(
                [sys.executable, *train, *together, "--process-id", str(k)],
                cwd=tmp_path,
                env={**environment, "JAX_PLATFORMS": "cpu"},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for k in range(2)
        ]

    reached = 0
    for _ in range(2):
        processes = start()
        limit = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) <= reached:
            assert time.monotonic() < limit
            time.sleep(0.1)
        for process in processes:
            process.send_signal(signal.SIGTERM)
        outputs = [process.communicate(timeout=120)[0] for process in processes]
        assert [process.returncode for process in processes] == [130, 130], outputs
        step = int(max((tmp_path / "runs/digits/checkpoints").iterdir()).name)
        assert f"stopped at step {step:,} and saved" in outputs[0]
        assert step % 50 == 0 and step > 50 * reached
        reached = step // 50
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == list(
        range(50, step + 50, 50)
    )


def test_what_is_wrong_in_one_process_stops_all(tmp_path):
    """Only the second finds no images: both end at once, each with a line."""
    images = np.random.default_rng(0).integers(0, 256, (9, 4, 4), np.uint8)
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        if k == 0:
            np.save(tmp_path / "0/x.npy", images)
    coordinator = f"127.0.0.1:{free_port()}"
    train = ["-m", "jax_ddpm", "train", "--data", "x.npy", "--batch-size", "4"]
    together = ["--coordinator", coordinator, "--num-processes", "2", "--process-id"]
    processes = [
        subprocess.Popen(
            [sys.executable, *train, *together, str(k)],
            cwd=tmp_path / str(k),
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(2)
    ]
    errors = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "another process failed" in errors[0]
    assert "--data: no such file or folder: x.npy" in errors[1]


@pytest.mark.parametrize(
    ("environment", "launched"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
    ],
)
def test_launchers_are_joined_when_they_start_several(monkeypatch, environment, launched):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given: calls.append(given))
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    connect()
    assert calls == [(None, None, None)] * launched


def test_one_flag_of_three_is_not_enough(tmp_path):
    ((_, stderr, code),) = run_all([["-m", "jax_ddpm", "train", "--num-processes", "2"]], tmp_path)
    assert code == 2 and "expected all three or none" in stderr
