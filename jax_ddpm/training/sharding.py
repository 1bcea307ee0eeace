"""Where arrays live: one mesh of devices, `data` × `fsdp`, and one rule for each kind of array.

    batch    split over both axes: every device has its own images
    state    (weights, their average, the optimizer's moments) split over `fsdp` along the longest
             axis of each array that `fsdp` divides; arrays without such an axis are replicated

By default `fsdp` is 1: every device holds the whole state, and only gradients are communicated.
With `fsdp` = n, a device stores 1/n of the state. Weights are gathered where the network uses
them, and their gradients are scattered back (Rajbhandari et al. 2020, "ZeRO").
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jax_ddpm._errors import FieldError


def device_mesh(batch_size: int, *, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh, `data` × `fsdp`, of as many devices as divide `batch_size`.

    Args:
      batch_size: images per step; with several processes a multiple of all devices.
      fsdp: the number of devices that one state is split over, a divisor of those in use.
      devices: of all processes. Default: `jax.devices()`.

    Raises:
      FieldError: `fsdp` does not divide the devices, or a process would have none.

    Examples:
      >>> from jax_ddpm.training import sharding
      >>> dict(sharding.device_mesh(batch_size=4, devices=jax.devices()[:1]).shape)
      {'data': 1, 'fsdp': 1}
    """
    devices = jax.devices() if devices is None else devices
    count = math.gcd(batch_size, len(devices))
    if len({device.process_index for device in devices[:count]}) < jax.process_count():
        problem = f"expected a multiple of the {len(devices)} devices of all processes"
        raise FieldError("batch_size", f"{problem}, got {batch_size}")
    if fsdp < 1 or count % fsdp:
        raise FieldError("fsdp", f"expected a divisor of the {count} devices in use, got {fsdp}")
    shape, auto = (count // fsdp, fsdp), (AxisType.Auto, AxisType.Auto)
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=auto, devices=devices[:count])


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch, or of samples: the leading axis is split over all of `mesh`."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """The `NamedSharding` of each array of a state, for `jax.device_put(state, …)`.

    Args:
      mesh: from `device_mesh`.
      tree: the state, or its shapes. An array is split over `fsdp` along the longest axis that
        `fsdp` divides; without one it is replicated.
    """
    parts = mesh.shape["fsdp"]

    def split(array) -> NamedSharding:
        axes = [axis for axis, length in enumerate(array.shape) if length % parts == 0]
        if parts == 1 or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(split, tree)


def gather_params(apply_fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`apply_fn` for parameters split over `fsdp`, which are gathered before the call.

    Without it, XLA may split the layers instead of the batch. The gradients return to the devices
    of the parameters; on TPUs and GPUs that is a reduce-scatter. Reverse mode only.
    """
    if mesh.shape["fsdp"] == 1:
        return apply_fn

    @jax.custom_vjp
    def gather(params):
        return lax.with_sharding_constraint(params, replicated(mesh))

    def scatter(_, grads):
        return (lax.with_sharding_constraint(grads, state_sharding(mesh, grads)),)

    gather.defvjp(lambda params: (gather(params), None), scatter)
    return lambda params, *arguments, **options: apply_fn(gather(params), *arguments, **options)
