"""The batches of a training: the order of the images, random flips and windows, prefetching.

Each is a pure function of the key and the step, so a resumed training gets the same batches. Each
sample of a step draws from its own key, whatever devices and hosts a batch is split over.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from functools import lru_cache
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from jax_ddpm._errors import FieldError, check_key, check_whole
from jax_ddpm._typing import Image, Pixels, PRNGKey

Images = Image | Pixels
"""[image, height, width, channel], floats or bytes."""


def batch_indices(
    key: PRNGKey, step: int | Array, dataset_size: int, batch_size: int
) -> Int[Array, "batch"]:
    """The images of a step, int32 [batch]: a slice of a permutation, drawn anew in each epoch.

    An epoch drops the images that do not fill a batch.

    Args:
      key: typed key, the same for all steps, also after a resume.
      step: number of the step, from 0; may be traced.
      dataset_size, batch_size: images in all, and per step.

    Raises:
      FieldError: `step` is negative or no integer, or `batch_size` exceeds `dataset_size`.

    Examples:
      >>> key = jax.random.key(0)
      >>> epoch = [data.batch_indices(key, step, 6, 2).tolist() for step in range(3)]
      >>> sorted(sum(epoch, []))
      [0, 1, 2, 3, 4, 5]
    """
    check_key("key", key)
    check_whole("step", step, 0)
    per_epoch = _steps_per_epoch(dataset_size, batch_size)
    order = _epoch_order(key, step // per_epoch, dataset_size)
    return lax.dynamic_slice_in_dim(order, step % per_epoch * batch_size, batch_size)


class Order:
    """The indices of a range of steps, as `batch_indices` gives them. Safe in several threads."""

    def __init__(self, key: PRNGKey, dataset_size: int, batch_size: int) -> None:
        self.batch_size, self._per_epoch = batch_size, _steps_per_epoch(dataset_size, batch_size)
        draw = jax.jit(lambda epoch: _epoch_order(key, epoch, dataset_size))
        self._epoch = lru_cache(2)(lambda epoch: np.asarray(draw(epoch)))

    def __call__(self, steps: range) -> np.ndarray:
        """int32 [step, batch]."""
        places = [divmod(step, self._per_epoch) for step in steps]
        size = self.batch_size
        return np.stack([self._epoch(epoch)[n * size : (n + 1) * size] for epoch, n in places])


def _steps_per_epoch(dataset_size: int, batch_size: int) -> int:
    if not 1 <= batch_size <= dataset_size:
        raise FieldError("batch_size", f"expected 1 to {dataset_size} (the data), got {batch_size}")
    return dataset_size // batch_size


def _epoch_order(key: PRNGKey, epoch: int | Array, dataset_size: int) -> Array:
    return jax.random.permutation(jax.random.fold_in(key, epoch), dataset_size)


def load_batch(array: Any, indices: np.ndarray, sharding: NamedSharding) -> Array:
    """`array[indices]` on the devices; each process reads only the rows of its own devices.

    Args:
      array: an array, or an object with a `shape` that reads rows by index (`Dataset.images`).
      indices: rows, integers of any shape.
      sharding: the placement; it may split the axes of `indices`, and no others.

    Examples:
      >>> from jax_ddpm.training import sharding
      >>> split = sharding.data_sharding(sharding.device_mesh(batch_size=4))
      >>> batch = data.load_batch(np.zeros((10, 8, 8, 1)), np.array([0, 3, 5, 9]), split)
      >>> batch.shape, batch.sharding == split
      ((4, 8, 8, 1), True)
    """
    shape = (*indices.shape, *array.shape[1:])

    def rows(index: Any) -> np.ndarray:
        return array[indices[index[: indices.ndim]]]

    return jax.make_array_from_callback(shape, sharding, rows)


def prefetched(
    arrays: Mapping[str, Any], order: Order, dispatches: Sequence[range], sharding: NamedSharding
) -> Generator[dict[str, jax.Array]]:
    """For each range of steps its rows of each array, [step, batch, …], placed as `sharding` says.

    Grain's threads keep as many dispatches ready as fit in 256 MiB, between 2 and 16. What reading
    raises is raised here, when its turn comes.
    """
    import grain

    def load(index: int) -> dict[str, jax.Array]:
        indices = order(dispatches[index])
        return {name: load_batch(array, indices, sharding) for name, array in arrays.items()}

    row = sum(np.prod(array.shape[1:]) * array.dtype.itemsize for array in arrays.values())
    rows = order.batch_size * max(map(len, islice(dispatches, 100)), default=1)
    ahead = int(np.clip(2**28 // (row * rows), 2, 16))
    options = grain.ReadOptions(num_threads=min(ahead, 8), prefetch_buffer_size=ahead)
    batches = grain.MapDataset.range(len(dispatches)).map(load).to_iter_dataset(options)
    with closing(iter(batches)) as ready:
        yield from ready


def random_flip(key: PRNGKey, images: Images) -> Array:
    """Mirror each image left to right with probability 1/2.

    Args:
      key: typed key. The draw of image k depends on the key and k only.
      images: [image, height, width, channel]; shape and dtype are kept.
    """

    def flip(key, image):
        return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

    return jax.vmap(flip)(_keys(key, images), images)


def random_crop(
    key: PRNGKey, images: Images, size: int, extents: Int[Array, "image 2"] | None = None
) -> Array:
    """Cut a window of size × size out of each image, at a uniformly random place.

    Args:
      key: typed key. The draw of image k depends on the key and k only.
      images: [image, height, width, channel]; the dtype is kept.
      size: height and width of the windows.
      extents: height and width of each image, [image, 2], in the upper left of its padding.
        Default: no padding.

    Raises:
      FieldError: `size` exceeds a side of the images.
    """
    _, height, width, channels = images.shape
    if not 1 <= size <= min(height, width):
        raise FieldError("size", f"expected 1 to {min(height, width)}, got {size}")
    if extents is None:
        extents = jnp.broadcast_to(jnp.array([height, width], jnp.int32), (len(images), 2))

    def crop(key, image, extent):
        top, left = jax.random.randint(key, (2,), 0, extent - size + 1)
        return lax.dynamic_slice(image, (top, left, 0), (size, size, channels))

    return jax.vmap(crop)(_keys(key, images), images, extents)


def augmentation(image_size: int | None, flip: bool) -> Callable[..., Array]:
    """The function of (key, images[, extents]) that cuts out windows, if any, then flips."""

    def augment(key: PRNGKey, images: Images, extents: Array | None = None) -> Array:
        crop_key, flip_key = jax.random.split(key)
        if image_size is not None and images.shape[1:3] != (image_size, image_size):
            images = random_crop(crop_key, images, image_size, extents)
        return random_flip(flip_key, images) if flip else jnp.asarray(images)

    return augment


def _keys(key: PRNGKey, images: Images) -> Array:
    check_key("key", key)
    if images.ndim != 4:
        raise FieldError("images", f"expected [image, height, width, channel], got {images.shape}")
    return jax.vmap(lambda sample: jax.random.fold_in(key, sample))(jnp.arange(len(images)))
