"""Standard normal noise that belongs to the sample, not to the batch.

Sample `j` at entry `i` draws from `fold_in(fold_in(key, first_sample + j), i)`. Sample 17 is the
same in a batch of 1 or 64, on one device or eight.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jax_ddpm._errors import FieldError, check_floats, check_key, check_shape, check_whole
from jax_ddpm._typing import AnyArray, NoiseFn, Place, PRNGKey, Shape


def sample_noise(
    key: PRNGKey | None,
    i: int | Array,
    shape: Shape,
    *,
    first_sample: int | Array = 0,
    sharding: Place = None,
    dtype: Any = float,
) -> Array:
    """Standard normal noise, [batch, …]; a sample's noise is the same in any batch.

    Args:
      key: typed key, `jax.random.key(seed)`.
      i: the entry of the chain; `p_sample_loop` draws x_T with `i` = T.
      shape: [batch, …] of the noise.
      first_sample: the number of the batch's first sample: 64 for the second batch of 64.
      sharding: of the result.
      dtype: of the result. Default: JAX's default float.

    Raises:
      ValueError: `key` is not a typed key, or `first_sample` is not a whole number of 0 or more.

    Examples:
      >>> key = jax.random.key(0)
      >>> four = ddpm.sample_noise(key, 5, (4, 8, 8, 1))
      >>> bool((four[3:] == ddpm.sample_noise(key, 5, (1, 8, 8, 1), first_sample=3)).all())
      True
    """
    if key is None:
        raise FieldError("key", "expected a key, or both x_T and noise_fn, got None")
    check_key("key", key)
    check_whole("first_sample", first_sample, 0)
    check_shape("first_sample", first_sample, ())

    def draw(sample):
        own_key = jax.random.fold_in(jax.random.fold_in(key, sample), i)
        # The numbers do not depend on the shape, and a CPU draws a long row twice as fast.
        return jax.random.normal(own_key, (math.prod(shape[1:]),), dtype).reshape(shape[1:])

    samples = place(first_sample + jnp.arange(shape[0]), sharding)
    return place(jax.vmap(draw)(samples), sharding)


def seed_key(seed: int) -> Array:
    """A typed key for each seed below 2**63; below 2**32 it is `jax.random.key(seed)`."""
    check_whole("seed", seed, 0, 2**63 - 1)
    with jax.enable_x64(True):  # or JAX drops the upper half
        return jax.random.key(int(seed))


def noise_source(
    key: PRNGKey | None,
    noise_fn: NoiseFn | None,
    x: AnyArray,
    first_sample: int | Array = 0,
    sharding: Place = None,
) -> NoiseFn:
    """`i -> noise` for `x`: the caller's `noise_fn`, or `sample_noise`."""
    options = {"first_sample": first_sample, "sharding": sharding, "dtype": x.dtype}

    def draw(i):
        if noise_fn is None:
            return sample_noise(key, i, x.shape, **options)
        noise = noise_fn(i)
        check_floats("output of noise_fn", noise, x.shape)
        return noise.astype(x.dtype)

    return draw


def place(x: Array, sharding: Place) -> Array:
    """Constrain `x` to `sharding`, on a mesh with Auto or Explicit axes."""
    if sharding is None:
        return x
    mesh = jax.sharding.get_abstract_mesh()
    if isinstance(sharding, NamedSharding):  # given for images, also used for [batch] arrays
        mesh, sharding = sharding.mesh, NamedSharding(sharding.mesh, P(*sharding.spec[: x.ndim]))
    if AxisType.Explicit in mesh.axis_types:
        return jax.device_put(x, sharding)
    return lax.with_sharding_constraint(x, sharding)
