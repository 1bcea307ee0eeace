"""Named array types, in one place.

Images are NHWC in [-1, 1]. The maths never looks inside an image, so it is written for any
`Sample`: a leading batch axis and whatever follows it.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
from jax.sharding import PartitionSpec, Sharding
from jaxtyping import Array, Bool, Float, Integer, Key, Real, UInt8

_AnyArray: TypeAlias = Array | np.ndarray

AnyArray: TypeAlias = Real[_AnyArray, "..."] | Bool[_AnyArray, "..."]
"""Of any shape, of numbers or booleans."""

Image: TypeAlias = Float[_AnyArray, "batch height width channel"]
"""A batch of images, NHWC, pixels in [-1, 1]."""

Picture: TypeAlias = Float[_AnyArray, "height width channel"]
"""One image of a batch."""

Pixels: TypeAlias = UInt8[_AnyArray, "batch height width channel"]
"""A batch of images, NHWC, as bytes."""

Sample: TypeAlias = Float[_AnyArray, "batch *event"]
"""A batch of whatever diffuses."""

Place: TypeAlias = Sharding | PartitionSpec
"""Where a batch lies: `NamedSharding(mesh, P("data"))`, or `P("data")` inside `jax.set_mesh`."""

Shape: TypeAlias = Sequence[Any]
"""[batch, …]: integers, or a symbolic batch of `jax.export`, whose type JAX keeps to itself."""

PerSample: TypeAlias = Float[_AnyArray, "batch"]
"""One number for each sample of the batch: an un-reduced loss."""

Rows: TypeAlias = Float[_AnyArray, "_ feature"]
"""Features of several images."""

Mean: TypeAlias = Float[_AnyArray, "feature"]
"""Of the features of many images."""

Covariance: TypeAlias = Float[_AnyArray, "feature feature"]
"""Of the features of many images."""

Label: TypeAlias = Integer[_AnyArray, "batch"]
"""The class of each sample."""

Condition: TypeAlias = Real[_AnyArray, "batch *condition"] | Bool[_AnyArray, "batch *condition"]
"""What a network is told of each sample beside it: a class, or an image of its own."""

Numbers: TypeAlias = Sequence[float] | Real[_AnyArray, "numbers"]
"""A few of them, in a list or an array."""

Timestep: TypeAlias = Integer[_AnyArray, "batch"] | Integer[_AnyArray, ""] | int | np.integer
"""Entries of the chain, 0 … T - 1: one a sample, or one for all of them."""

Time: TypeAlias = Real[_AnyArray, "batch"] | Real[_AnyArray, ""] | float | int | np.number
"""The step number that a network is shown, whole or not: one a sample, or one for all of them."""

Weight: TypeAlias = Real[_AnyArray, "*batch"] | float | int
"""How much of something: one number a sample, [batch] or [batch, 1, …], or one for all of them."""

Table: TypeAlias = Float[_AnyArray, "timesteps"]
"""One number for each entry of the chain."""

PRNGKey: TypeAlias = Key[Array, ""]
"""A typed key, as `jax.random.key` makes it."""

DenoiseFn: TypeAlias = Callable[[Array, Array], Any]
"""`(x_t, t) -> output`: the one type in which the network and the maths meet.

`t` is int32 [batch], the training timestep; the output has the shape of `x_t`, or twice its
channels (last axis) where the variance is learned. `Any`, since Flax's `apply` says no more.
"""

Output: TypeAlias = Float[_AnyArray, "..."]
"""What a function that was handed in returns."""

NoiseFn: TypeAlias = Callable[[Array], Array]
"""`i -> noise [batch, …]`: the standard normal draw for entry `i` of the chain."""

ThresholdFn: TypeAlias = Callable[[Array], Array]
"""`x_start -> x_start`: what keeps a predicted x_0 in range, in place of clipping to [-1, 1]."""
