"""Named array types of public signatures.

Images are NHWC in [-1, 1]. The maths never looks inside an image, so it is written for any
`Sample`: a leading batch axis and whatever follows it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Integer, Key, Real, UInt8

_Array: TypeAlias = Array | np.ndarray

AnyArray: TypeAlias = Real[_Array, "..."] | Bool[_Array, "..."]
Image: TypeAlias = Float[_Array, "batch height width channel"]
Pixels: TypeAlias = UInt8[_Array, "batch height width channel"]
Sample: TypeAlias = Float[_Array, "batch *event"]
PerSample: TypeAlias = Float[_Array, "batch"]
Rows: TypeAlias = Float[_Array, "_ feature"]
Label: TypeAlias = Integer[_Array, "batch"]
Table: TypeAlias = Float[_Array, "timesteps"]
PRNGKey: TypeAlias = Key[Array, ""]

Shape: TypeAlias = Sequence[Any]
"""[batch, …]: integers, or a symbolic batch of `jax.export`, whose type is private to JAX."""

Place: TypeAlias = Sharding | PartitionSpec | None
"""The sharding of a batch: `NamedSharding(mesh, P("data"))`, or `P("data")` in `jax.set_mesh`."""

Timestep: TypeAlias = Integer[_Array, "batch"] | Integer[_Array, ""] | int | np.integer
"""Entries of the chain, 0 … T - 1: one for each sample, or one for all."""

Time: TypeAlias = Real[_Array, "batch"] | Real[_Array, ""] | float | int | np.number
"""A network's step number, whole or fractional: one for each sample, or one for all."""

Weight: TypeAlias = Real[_Array, "*batch"] | float | int
"""One number for each sample, [batch] or [batch, 1, …], or one for all."""

DenoiseFn: TypeAlias = Callable[[Array, Array], Any]  # Flax's `apply` says no more than Any
"""`(x_t, t) -> output`: the one type in which the network and the maths meet.

x_t is [batch, …], and t the training timestep, int32 [batch]. The output has the shape of x_t, or
twice its channels (last axis) for a learned variance. Weights and labels are closed over:
`lambda x_t, t: model.apply(variables, x_t, t, labels)`.
"""

NoiseFn: TypeAlias = Callable[[Array], Array]
"""`i -> noise [batch, …]`: the standard normal draw for entry `i` of the chain."""

Clipping: TypeAlias = bool | Callable[[Array], Array]
"""Whether a predicted x_0 is clipped to [-1, 1], or a function `x_start -> x_start` instead."""
