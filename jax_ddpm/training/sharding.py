"""Where arrays live: one mesh, and one rule for each kind of array.

    mesh          devices as a rectangle, `data` × `fsdp`
    batch         split over both axes: every device has images of its own
    state         (weights, their average, the optimizer's moments) split over `fsdp`, along each
                  array's longest axis that `fsdp` divides; whole on every device where none is

With `fsdp` 1, the default, every device holds the whole state and only gradients travel. With
more, what a device keeps between steps shrinks `fsdp` times: the weights are gathered where the
network uses them, and their gradients leave it scattered as the weights lie (Rajbhandari et al.
2020, "ZeRO").
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ddpm._errors import FieldError


def device_mesh(batch_size: int, *, fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of as many of the devices as split `batch_size` evenly, `fsdp` of them to a state.

    Raises `FieldError` if `fsdp` does not divide them, or if a process would be left without.
    """
    devices = jax.devices() if devices is None else devices
    count = math.gcd(batch_size, len(devices))
    if len({device.process_index for device in devices[:count]}) < jax.process_count():
        problem = f"expected a multiple of the {len(devices)} devices of {jax.process_count()} "
        raise FieldError("batch_size", f"{problem}processes, got {batch_size}")
    if fsdp < 1 or count % fsdp:
        raise FieldError("fsdp", f"expected a divisor of the {count} devices in use, got {fsdp}")
    return jax.make_mesh(
        (count // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto, AxisType.Auto),
        devices=devices[:count],
    )


def data_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis, the batch, split over all devices."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device."""
    return NamedSharding(mesh, P())


def state_sharding(mesh: Mesh, tree: Any) -> Any:
    """Where each array of a state lives, by its shape alone: a tree of `NamedSharding`."""
    parts = mesh.shape["fsdp"]

    def split(array) -> NamedSharding:
        axes = [axis for axis, length in enumerate(array.shape) if length % parts == 0]
        if parts == 1 or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: array.shape[axis])
        return NamedSharding(mesh, P(*[None] * longest, "fsdp"))

    return jax.tree.map(split, tree)


def gather_params(apply_fn: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`apply_fn` for parameters that are split over `fsdp`: made whole where they are used.

    Left to itself, XLA may split the layers instead of the batch. The gradients go back to where
    the parameters are: TPUs and GPUs reduce-scatter them. Only reverse mode passes through.
    """
    if mesh.shape["fsdp"] == 1:
        return apply_fn

    @jax.custom_vjp
    def gather(params):
        return lax.with_sharding_constraint(params, replicated(mesh))

    def scatter(_, grads):
        return (lax.with_sharding_constraint(grads, state_sharding(mesh, grads)),)

    gather.defvjp(lambda params: (gather(params), None), scatter)

    def gathered(params, *arguments, **options):
        return apply_fn(gather(params), *arguments, **options)

    return gathered
