"""InceptionV3 as FID uses it: the graph that TensorFlow published in 2015 (Szegedy et al. 2015).

It differs from the paper and from torchvision in three places: images are resized as in
TensorFlow 1, average pooling excludes padding, and the last block uses maximum pooling where the
others use averages. Names are PyTorch's; batch normalisation is folded into each convolution.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from jax_ddpm._errors import FieldError, described
from jax_ddpm._typing import Pixels
from jax_ddpm.models.layers import Features

FEATURES = {"64": 64, "192": 192, "768": 768, "2048": 2048, "logits_unbiased": 1008}
"""Names of the outputs, and the length of each."""


class InceptionV3(nn.Module):
    """Features of uint8 images of any size, by name.

    These are the spatial means after the first, second, third and last stage, and the logits of
    1,008 classes without bias. `precision` is that of matrix products; by default it is the
    highest, since TF32 and bfloat16 change the features.
    """

    dtype: Any = jnp.float32
    precision: Any = lax.Precision.HIGHEST

    @nn.compact
    def __call__(self, images: Pixels) -> dict[str, Array]:
        if images.dtype != np.uint8 or images.shape[3:] != (3,):
            expected = "expected uint8 [batch, height, width, 3]"
            raise FieldError("images", f"{expected}, got {described(images)}")
        policy = {"dtype": self.dtype, "param_dtype": self.dtype, "precision": self.precision}

        def conv(x: Features, name: str, features: int, size: Any = 1, stride: int = 1, pad=None):
            size = (size, size) if isinstance(size, int) else size
            pad = pad or ("SAME" if stride == 1 else "VALID")
            return nn.relu(nn.Conv(features, size, stride, pad, name=name, **policy)(x))

        def block(x: Features, name: str, kind: Callable[..., list[Features]], *widths: int):
            def branch(x: Features, *layers: tuple) -> Features:
                """A chain of convolutions, each as (name, features[, size[, stride]])."""
                for layer, *options in layers:
                    x = conv(x, f"{name}.{layer}", *options)
                return x

            return jnp.concatenate(kind(branch, x, *widths), axis=-1)

        x = _resize_like_tensorflow1(jnp.asarray(images, self.dtype), 299)
        x = (x - 128) / 128
        x = conv(x, "Conv2d_1a_3x3", 32, 3, 2)
        x = conv(x, "Conv2d_2a_3x3", 32, 3, pad="VALID")
        x = conv(x, "Conv2d_2b_3x3", 64, 3)
        first = x = _maximum(x)
        x = conv(x, "Conv2d_3b_1x1", 80)
        x = conv(x, "Conv2d_4a_3x3", 192, 3, pad="VALID")
        second = x = _maximum(x)
        x = block(x, "Mixed_5b", _five, 32)
        x = block(x, "Mixed_5c", _five, 64)
        x = block(x, "Mixed_5d", _five, 64)
        x = block(x, "Mixed_6a", _halve_by_three)
        x = block(x, "Mixed_6b", _seven, 128)
        x = block(x, "Mixed_6c", _seven, 160)
        x = block(x, "Mixed_6d", _seven, 160)
        third = x = block(x, "Mixed_6e", _seven, 192)
        x = block(x, "Mixed_7a", _halve_by_seven)
        x = block(x, "Mixed_7b", partial(_wide, pool=_average))
        x = block(x, "Mixed_7c", partial(_wide, pool=partial(_maximum, stride=1, padding="SAME")))
        means = [each.mean((1, 2)) for each in (first, second, third, x)]
        logits = nn.Dense(FEATURES["logits_unbiased"], use_bias=False, name="fc", **policy)
        return dict(zip(FEATURES, [*means, logits(means[-1])], strict=True))


def _resize_like_tensorflow1(images: Features, size: int) -> Features:
    """Bilinear interpolation as in TensorFlow 1: pixel i is taken at i · length / size, without
    the half-pixel offset, and nothing is averaged when images shrink."""
    for axis in (2, 1):
        length = images.shape[axis]
        # TensorFlow's scale is float32, whatever the dtype of the images.
        places = np.arange(size, dtype=images.dtype) * np.float32(length / size)
        low = places.astype(np.int32)
        shape = [1] * 4
        shape[axis] = size
        share = jnp.asarray((places - low).reshape(shape), images.dtype)
        below = jnp.take(images, low, axis)
        above = jnp.take(images, np.minimum(low + 1, length - 1), axis)
        images = below + (above - below) * share
    return images


def _five(branch, x: Features, pooled: int) -> list[Features]:
    return [
        branch(x, ("branch1x1", 64)),
        branch(x, ("branch5x5_1", 48), ("branch5x5_2", 64, 5)),
        branch(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)),
        branch(_average(x), ("branch_pool", pooled)),
    ]


def _halve_by_three(branch, x: Features) -> list[Features]:
    return [
        branch(x, ("branch3x3", 384, 3, 2)),
        branch(x, ("branch3x3dbl_1", 64), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3, 2)),
        _maximum(x),
    ]


def _seven(branch, x: Features, width: int) -> list[Features]:
    wide, tall = (1, 7), (7, 1)
    return [
        branch(x, ("branch1x1", 192)),
        branch(x, ("branch7x7_1", width), ("branch7x7_2", width, wide), ("branch7x7_3", 192, tall)),
        branch(
            x,
            ("branch7x7dbl_1", width),
            ("branch7x7dbl_2", width, tall),
            ("branch7x7dbl_3", width, wide),
            ("branch7x7dbl_4", width, tall),
            ("branch7x7dbl_5", 192, wide),
        ),
        branch(_average(x), ("branch_pool", 192)),
    ]


def _halve_by_seven(branch, x: Features) -> list[Features]:
    return [
        branch(x, ("branch3x3_1", 192), ("branch3x3_2", 320, 3, 2)),
        branch(
            x,
            ("branch7x7x3_1", 192),
            ("branch7x7x3_2", 192, (1, 7)),
            ("branch7x7x3_3", 192, (7, 1)),
            ("branch7x7x3_4", 192, 3, 2),
        ),
        _maximum(x),
    ]


def _wide(branch, x: Features, pool: Callable[[Features], Features]) -> list[Features]:
    wide, tall = (1, 3), (3, 1)
    three = branch(x, ("branch3x3_1", 384))
    double = branch(x, ("branch3x3dbl_1", 448), ("branch3x3dbl_2", 384, 3))
    return [
        branch(x, ("branch1x1", 320)),
        branch(three, ("branch3x3_2a", 384, wide)),
        branch(three, ("branch3x3_2b", 384, tall)),
        branch(double, ("branch3x3dbl_3a", 384, wide)),
        branch(double, ("branch3x3dbl_3b", 384, tall)),
        branch(pool(x), ("branch_pool", 192)),
    ]


def _maximum(x: Features, stride: int = 2, padding: str = "VALID") -> Features:
    """Maximum pooling over 3×3 pixels."""
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _average(x: Features) -> Features:
    """Average pooling over 3×3 pixels, excluding padding."""
    count = [np.convolve(np.ones(length), np.ones(3), "same") for length in x.shape[1:3]]
    total = nn.pooling.pool(x, 0.0, lax.add, (3, 3), (1, 1), "SAME")
    return total / jnp.asarray(np.outer(*count)[None, :, :, None], x.dtype)
