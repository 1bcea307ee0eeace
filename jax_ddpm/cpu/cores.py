"""The cores of a CPU as JAX devices, so that the program of a laptop is that of a TPU slice.

XLA's convolutions leave cores waiting for one another; a batch split over cores, one device per
core, does not. Milliseconds of a training step in a scan of ten, `SimpleUNet` at 64×64, and the
default network of `jax-ddpm train` on 8×8 digits, on two AMD EPYC cores (Zen 5):

                            one device   two devices
    0.12.0.1   batch 4          43.7         39.9
               batch 16        181.3        161.3
               digits           54           47

In jax 0.10 a convolution of 64 channels fills one core alone, and two devices take half the time.
"""

import os
import sys
from glob import glob
from importlib.util import find_spec
from typing import Any

import jax

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")
"""What Linux shows of NVIDIA's and AMD's GPUs, and of TPUs."""


def use_cores() -> None:
    """Make each of the host's cores a JAX device. Call before JAX's first use.

    Without effect where JAX will use another backend, and where `JAX_NUM_CPU_DEVICES` or
    `XLA_FLAGS` says how many devices there are.
    """
    config: Any = jax.config
    flags = os.environ.get("XLA_FLAGS", "")
    if config.jax_num_cpu_devices >= 0 or "xla_force_host_platform_device_count" in flags:
        return
    if not _is_backend(config.jax_platforms):
        return
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    config.update("jax_num_cpu_devices", cores or 1)


def _is_backend(platforms: str | None) -> bool:
    """Whether JAX will compute on the CPU, without asking it: that would start its backends."""
    if platforms:
        return platforms.split(",")[0] == "cpu"
    if find_spec("jax_plugins") is None and find_spec("libtpu") is None:
        return True
    return sys.platform == "linux" and not any(map(glob, _ACCELERATORS))
