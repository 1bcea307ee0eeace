"""A small classifier whose last hidden layer says what an image looks like."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jax_ddpm._typing import Image

_SIZE = 32
_PATCHES = 8
_WIDTH = 64


class FeatureClassifier(nn.Module):
    """One dense layer over patches, at most 8×8 of them, and three over all of them together.
    Images larger than 32×32 are made smaller first.

    Attributes:
      num_classes: of the output.
    """

    num_classes: int

    @nn.compact
    def __call__(
        self, images: Image
    ) -> tuple[Float[Array, "batch feature"], Float[Array, "batch class"]]:
        """64 features, the last hidden layer before its ReLU, and logits, of images in [-1, 1]."""
        batch, height, width, channels = images.shape
        size = (batch, min(height, _SIZE), min(width, _SIZE), channels)
        x = jnp.asarray(images)
        if size != x.shape:
            x = jax.image.resize(x, size, "linear")
        side = -(-max(size[1:3]) // _PATCHES)
        # Whole patches; the last row and column are repeated.
        rest = [(0, -length % side) for length in size[1:3]]
        x = jnp.pad(x, ((0, 0), *rest, (0, 0)), "edge")
        rows, columns = x.shape[1] // side, x.shape[2] // side
        x = x.reshape(batch, rows, side, columns, side, channels).swapaxes(2, 3)
        x = nn.relu(nn.Dense(_WIDTH)(x.reshape(batch, rows * columns, -1)))
        x = nn.relu(nn.Dense(4 * _WIDTH)(x.reshape(batch, -1)))
        features = nn.Dense(_WIDTH)(x)
        return features, nn.Dense(self.num_classes)(nn.relu(features))
