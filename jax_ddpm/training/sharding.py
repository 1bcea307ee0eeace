"""Where arrays live: the batch is split over the mesh's `data` axis, the weights are everywhere.

The cores of a CPU become devices, so that the program of a laptop is that of a TPU slice.
"""

import math
import os

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

__all__ = ["data_mesh", "data_sharding", "replicated", "use_cpu_cores"]


def use_cpu_cores(*, collectives: bool) -> None:
    """Make each of the host's cores a JAX device. Call before JAX's first use.

    XLA splits a convolution over output channels in large blocks, which leaves cores idle;
    splitting the batch over cores does not. Without effect where another backend is used.

    `collectives` says that devices will talk to each other, as training's do and sampling's do
    not. They share one pool of threads, by default one for each core, and every all-reduce of
    a step may hold one while it waits for the others: too small a pool stops for good. A large
    one costs sampling a quarter of its speed at small batches.
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if collectives:
        os.environ.setdefault("NPROC", str(32 * (count or 1)))
    jax.config.update("jax_num_cpu_devices", count or 1)


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
