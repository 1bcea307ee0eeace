"""The order of the data: a pure function of the key and the step, so that nothing is lost.

There is no iterator to save: a run that resumes at step n asks for batch n.
"""

from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from jax_ddpm._errors import check_key, check_whole
from jax_ddpm._typing import PRNGKey


def batch_indices(
    key: PRNGKey, step: int | Array, dataset_size: int, batch_size: int
) -> Int[Array, "batch"]:
    """Which images step `step` sees: slices of a permutation that each epoch draws anew.

    An epoch drops what does not fill a batch. `step` may be traced (the order can live inside
    a scan). Raises `ValueError` if a batch is larger than the data.
    """
    check_key("key", key)
    check_whole("step", step, 0)
    per_epoch = steps_per_epoch(dataset_size, batch_size)
    order = epoch_order(key, step // per_epoch, dataset_size)
    return lax.dynamic_slice_in_dim(order, step % per_epoch * batch_size, batch_size)


def steps_per_epoch(dataset_size: int, batch_size: int) -> int:
    """How many whole batches there are. Raises `ValueError` if there are none."""
    if not 1 <= batch_size <= dataset_size:
        raise ValueError(f"batch_size: expected 1 to {dataset_size} (the data), got {batch_size}")
    return dataset_size // batch_size


def epoch_order(key: PRNGKey, epoch: int | Array, dataset_size: int) -> Int[Array, "dataset_size"]:
    """The permutation of an epoch."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), dataset_size)


def load_batch(array: Any, indices: np.ndarray, sharding: NamedSharding) -> Array:
    """`array[indices]`, placed; each process reads only the rows that its own devices get.

    `array` is NumPy's, or anything with its `shape` and rows by index.
    `indices` may have any shape; `sharding` may split its axes, and no others.
    """
    shape = (*indices.shape, *array.shape[1:])

    def rows(index: Any) -> np.ndarray:
        return array[indices[index[: indices.ndim]]]

    return jax.make_array_from_callback(shape, sharding, rows)
