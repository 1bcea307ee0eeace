"""Cores become devices where JAX computes on the CPU, and nothing is set anywhere else."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from jax_ddpm.cpu import cores


@pytest.fixture
def devices(monkeypatch):
    """The number of devices that a process with 96 cores gets, -1 where nothing is set."""

    def count(platforms=None, *, number=-1, flags="", plugin=False, files=()):
        config = SimpleNamespace(jax_num_cpu_devices=number, jax_platforms=platforms)
        config.update = lambda name, value: setattr(config, name, value)
        monkeypatch.setattr(cores, "jax", SimpleNamespace(config=config))
        monkeypatch.setattr(cores, "find_spec", lambda name: plugin or None)
        monkeypatch.setattr(cores, "glob", lambda pattern: list(files))
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(96), raising=False)
        monkeypatch.setenv("XLA_FLAGS", flags)
        cores.use_cores()
        return config.jax_num_cpu_devices

    return count


def test_where_platforms_and_devices_are_said(devices):
    assert devices("cpu") == 96
    assert devices("tpu,cpu") == -1
    assert devices("cpu", number=3) == 3
    assert devices("cpu", flags="--xla_force_host_platform_device_count=4") == -1


@pytest.mark.skipif(sys.platform != "linux", reason="devices are seen as Linux shows them")
def test_where_jax_chooses(devices):
    assert devices(plugin=False, files=["/dev/nvidia0"]) == 96
    assert devices(plugin=True) == 96
    assert devices(plugin=True, files=["/dev/nvidia0"]) == -1


def test_jax_has_them_and_the_environment_is_as_it_was():
    code = """
import os
os.sched_getaffinity = lambda process: range(3)
import jax
from jax_ddpm.cpu import use_cores
before = dict(os.environ)
use_cores()
print(jax.device_count(), os.environ == before)
"""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    del environment["JAX_NUM_CPU_DEVICES"]
    output = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert output == "3 True\n"
