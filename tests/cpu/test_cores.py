"""Cores become devices where JAX computes on the CPU, and nothing is set anywhere else."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, os
os.sched_getaffinity = lambda process: range(96)
import jax
from jax_ddpm.cpu import cores
before = dict(os.environ)
if {found!r} is not None:
    cores.find_spec = lambda name: {found!r}[0] or None
    cores.glob = lambda pattern: {found!r}[1]
cores.use_cores()
print(json.dumps([jax.config.jax_num_cpu_devices, os.environ == before]))
"""


def devices(found=None, **environment):
    environment = {
        **{name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"},
        **environment,
    }
    command = [sys.executable, "-c", CODE.format(found=found)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    count, unchanged = json.loads(result.stdout)
    assert unchanged
    return count


@pytest.mark.parametrize(
    ("count", "environment"),
    [
        (96, {"JAX_PLATFORMS": "cpu"}),
        (-1, {"JAX_PLATFORMS": "cuda"}),
        (-1, {"JAX_PLATFORMS": "tpu,cpu"}),
        (3, {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "3"}),
        (-1, {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}),
    ],
)
def test_96_cores(count, environment):
    assert devices(**environment) == count


@pytest.mark.parametrize(
    ("count", "plugin", "files"),
    [(96, False, ["/dev/nvidia0"]), (96, True, []), (-1, True, ["/dev/nvidia0"])],
    ids=["a GPU without a plugin", "a plugin without a GPU", "both"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="devices are seen as Linux shows them")
def test_96_cores_where_jax_chooses(count, plugin, files):
    assert devices(found=(plugin, files)) == count
