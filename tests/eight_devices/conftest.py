"""Tests of sharding, in a process with eight devices, which `tests/test_eight_devices.py` starts.

By hand: `JAX_NUM_CPU_DEVICES=8 pytest -n0 tests/eight_devices`.
"""

import jax

collect_ignore_glob = [] if jax.device_count() == 8 else ["test_*.py"]
