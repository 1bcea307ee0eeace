"""The tests of sharding: JAX counts its devices once, so they have a process of their own."""

import os
import subprocess
import sys
from pathlib import Path


def test_on_eight_devices(pytestconfig):
    """All of `eight_devices/`, or those of the circle that is run here."""
    command = [sys.executable, "-m", "pytest", "-n0", "-q", "-m", pytestconfig.option.markexpr]
    result = subprocess.run(
        [*command, "eight_devices"],
        cwd=Path(__file__).parent,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
