"""Batches ahead of the device: threads read, decode and place what the next steps need.

The order is a pure function of the key and the step, so there is no state to save: a run that
resumes asks for the batches after the last one. Grain runs the threads; each process reads the
rows that its own devices get, and no others.
"""

import threading
from collections.abc import Generator, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jax_ddpm._typing import PRNGKey
from jax_ddpm.data.order import epoch_order, load_batch, steps_per_epoch

_AHEAD_BYTES = 2**28
_AHEAD = 16
_THREADS = 8


class Order:
    """The indices of a range of steps, as `batch_indices` gives them one by one; the permutation
    of an epoch is drawn once. Safe in several threads."""

    def __init__(self, key: PRNGKey, dataset_size: int, batch_size: int) -> None:
        self._per_epoch = steps_per_epoch(dataset_size, batch_size)
        self.batch_size, self._lock = batch_size, threading.Lock()
        draw = jax.jit(lambda epoch: epoch_order(key, epoch, dataset_size))
        self._epoch = lru_cache(2)(lambda epoch: np.asarray(draw(epoch)))

    def __call__(self, steps: range) -> np.ndarray:
        """int32 [step, batch]."""
        return np.stack([self._batch(step) for step in steps])

    def _batch(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, self._per_epoch)
        with self._lock:
            order = self._epoch(epoch)
        return order[place * self.batch_size :][: self.batch_size]


def prefetched(
    arrays: Mapping[str, Any], order: Order, dispatches: Sequence[range], sharding: NamedSharding
) -> Generator[dict[str, jax.Array]]:
    """For each range of steps its rows of each array, [step, batch, …], placed as `sharding` says.

    An array is anything with `shape`, `dtype` and rows by index. As many dispatches are kept ready
    as fit in 256 MiB, between 2 and 16. What reading raises is raised here, when its turn comes.
    """
    import grain

    class Dispatches:
        def __len__(self) -> int:
            return len(dispatches)

        def __getitem__(self, index: int) -> dict[str, jax.Array]:
            indices = order(dispatches[index])
            return {name: load_batch(array, indices, sharding) for name, array in arrays.items()}

    row = sum(np.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays.values())
    size = order.batch_size * int(row) * max(map(len, islice(dispatches, 100)), default=0)
    ahead = int(np.clip(_AHEAD_BYTES // max(size, 1), 2, _AHEAD))
    options = grain.ReadOptions(num_threads=min(ahead, _THREADS), prefetch_buffer_size=ahead)
    source: Any = Dispatches()
    batches = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()
