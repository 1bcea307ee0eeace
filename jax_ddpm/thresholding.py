"""What keeps a predicted x_0 in range, for `clip_denoised` of `p_mean_variance` and the loops.

Frozen dataclasses that are called: equal where their numbers are, and those can be read back,
for the config file of a checkpoint, say.
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array


@dataclass(frozen=True)
class StaticThreshold:
    """Clips x_0 to ±`limit`."""

    limit: float

    def __call__(self, x_start: Array) -> Array:
        return jnp.clip(x_start, -self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clips each sample to ±s, its own `quantile` of |x_0|, and divides by s."""

    quantile: float
    max_value: float

    def __call__(self, x_start: Array) -> Array:
        magnitude = jnp.sort(jnp.abs(x_start).reshape(x_start.shape[0], -1), axis=-1)
        # Which pixels it lies between is known on the host, to more digits than float32 has.
        position = self.quantile * (magnitude.shape[1] - 1)
        low, high = math.floor(position), math.ceil(position)
        between = magnitude[:, low] + (position - low) * (magnitude[:, high] - magnitude[:, low])
        s = jnp.minimum(jnp.maximum(between, 1), self.max_value)
        s = s.reshape(-1, *(1,) * (x_start.ndim - 1))
        return jnp.clip(x_start, -s, s) / s


def static_threshold(limit: float) -> StaticThreshold:
    """Clip x_0 to ±`limit` (diffusers' `clip_sample_range`). `ValueError` unless it is positive."""
    if not limit > 0:
        raise ValueError(f"limit: expected a positive number, got {limit}")
    return StaticThreshold(limit)


def dynamic_threshold(quantile: float = 0.995, max_value: float = 1.0) -> DynamicThreshold:
    """Clip x_0 to ±s and divide by s (Saharia et al. 2022, §2.3), with s for each sample the
    `quantile` of |x_0|, at least 1 and at most `max_value`.

    The numbers are diffusers' `dynamic_thresholding_ratio` and `sample_max_value`: at its default
    of 1, s is 1 and this clips to [-1, 1]. Raises `ValueError` for a quantile outside [0, 1] or a
    `max_value` that is not positive.
    """
    if not 0 <= quantile <= 1:
        raise ValueError(f"quantile: expected 0 to 1, got {quantile}")
    if not max_value > 0:
        raise ValueError(f"max_value: expected a positive number, got {max_value}")
    return DynamicThreshold(quantile, max_value)
