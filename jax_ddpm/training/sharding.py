"""Where arrays live: the batch is split over the mesh's `data` axis, the weights are everywhere.

The cores of a CPU become devices, so that the program of a laptop is that of a TPU slice.
"""

import math
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["data_mesh", "data_sharding", "replicated", "use_cpu_cores"]


def use_cpu_cores(count: int | None = None) -> None:
    """Make the host's cores (or `count` of them) JAX devices. Call before JAX's first use.

    XLA splits a convolution over output channels in large blocks, which leaves cores idle;
    splitting the batch over cores does not. Without effect where another backend is used.
    """
    count = count or len(os.sched_getaffinity(0))
    # The devices share one pool of threads, by default one for each core, and every all-reduce
    # of a step may hold one while it waits for the others: too small a pool stops for good.
    os.environ.setdefault("NPROC", str(32 * count))
    jax.config.update("jax_num_cpu_devices", count)


def data_mesh(batch_size: int) -> Mesh:
    """A mesh with one axis, `data`, of as many devices as split `batch_size` evenly."""
    count = math.gcd(batch_size, jax.device_count())
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis, the batch, split over `data`."""
    return NamedSharding(mesh, P("data"))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())
