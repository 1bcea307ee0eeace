"""Flips and random windows, drawn in the step itself: a pure function of the key and the sample.

Sample j of a step draws from a key of its own, so that how a batch is split over devices and
hosts does not matter, and a run that resumes draws the same.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int

from jax_ddpm._errors import FieldError, check_key
from jax_ddpm._typing import Image, Pixels, PRNGKey

Images = Image | Pixels
"""[image, height, width, channel], floats or bytes."""
Augment = Callable[..., Images]
"""`(key, images[, extents]) -> images`."""


def random_flip(key: PRNGKey, images: Images) -> Array:
    """Mirror each image left to right with probability 1/2."""

    def flip(key, image):
        return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)

    return jax.vmap(flip)(_keys(key, images), images)


def random_crop(
    key: PRNGKey, images: Images, size: int, extents: Int[Array, "image 2"] | None = None
) -> Array:
    """Cut a window of size × size out of each image, anywhere with the same probability.

    `extents` are the height and width of what each image holds, in its upper left; by default all
    of it. Raises `FieldError` if the images are smaller than the window.
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


def augmentation(image_size: int | None, flip: bool) -> Augment:
    """The function of (key, images, extents) that cuts out windows, then flips; `image_size` is
    None where nothing is cut."""

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
