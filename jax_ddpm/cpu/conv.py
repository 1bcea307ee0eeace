"""XLA's convolution, with a derivative that runs fast on its CPU backend.

Both gradients of a convolution are convolutions, of the same arrays with other axes as batch and
channels. GPUs and TPUs choose their own layouts. XLA's CPU backend is fast only for NHWC with HWIO,
and converts to that layout only outside loops: inside a scan a gradient takes 4 to 40 times as
long, or more. Its filter gradients are slow everywhere. Milliseconds of the gradients that JAX
derives, on two AMD EPYC cores (Zen 5), for images × size², channels in → out:

                                    filter gradient      image gradient
                                    in a scan  outside   in a scan  outside
    0.12.0.1   16 × 64², 64 → 128     >2250      128        529        21
               16 × 64², 128 → 64     >2250       58        512        31
                4 × 32², 128 → 128      166      6.9         67       3.0
                4 × 4², 256 → 256       2.3      0.6        3.2       0.8
    0.10.2     16 × 64², 64 → 128     >2250       96         66        63
                4 × 32², 128 → 128      160      5.9        7.6       2.9

With the gradients below, each of ten `SimpleUNet` steps in a scan (16 images at 64×64, two devices,
0.12.0.1) takes 161 ms; the first two filter gradients above alone would take 4,500.

On a CPU the derivative is therefore given by the functions below, and the backward pass runs their
transposes. It is a JVP, not a VJP, so forward mode and higher derivatives still work.

The filter gradient is a matrix product, summed over a few hundred pixels at a time:

    dw[i, j] = Σ x[i, j around the pixel]ᵀ dy[pixel]

The neighbourhoods (`_patches`) are those of the side with fewer channels: around a pixel of x, the
offsets of dy are those of x around a pixel of dy, with the opposite sign. The image gradient is a
convolution, or for few pixels also a product, where flipping the kernel would dominate the time.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import AxisType, auto_axes
from jaxtyping import Array

_PATCHES, _MOST_PIXELS = 9 * 2**16, 4096
"""Limits on a part: numbers in its patches, and pixels. With a kernel and its gradient, a part fits
in the cache of a core."""

_WIDE = 32
"""Rows with fewer pixels are too short for patches of the output."""

_FEW = 2
"""Up to this many output pixels per output channel, summing the gradients of their patches takes
less time than flipping the kernel."""

Padding = tuple[tuple[int, int], ...]


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """`lax.conv_general_dilated` for NHWC images and HWIO kernels, as `flax.linen.Conv` calls it.

    Raises `ValueError` for other layouts, dilations and groups.
    """
    precision = options.pop("precision", None)
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    given = options.pop("dimension_numbers", None) or layout
    if lax.conv_dimension_numbers(lhs.shape, rhs.shape, given) != layout:
        raise ValueError(f"dimension_numbers: expected NHWC and HWIO, got {given}")
    for name, value in options.items():
        if np.any(np.not_equal(value, 1)):
            raise ValueError(f"{name}: expected 1, got {value}")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], window_strides, padding)
    return _conv(lhs, rhs, tuple(window_strides), tuple(map(tuple, padding)), precision)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _conv(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding, precision) -> Array:
    return _lax_conv(x, kernel, strides, padding, precision)


def _lax_conv(x, kernel, strides, padding, precision, layout=("NHWC", "HWIO", "NHWC")) -> Array:
    return lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=layout, precision=precision
    )


@partial(_conv.defjvp, symbolic_zeros=True)
def _conv_jvp(strides, padding, precision, primals, tangents):
    plain = partial(_lax_conv, strides=strides, padding=padding, precision=precision)
    (x, kernel), (x_dot, kernel_dot) = primals, tangents
    output = _conv(x, kernel, strides, padding, precision)
    sharding = jax.typeof(output).sharding

    def term(on_cpu, *operands):
        on_cpu = partial(on_cpu, strides=strides, padding=padding, precision=precision)
        if AxisType.Explicit in sharding.mesh.axis_types:  # no rules for these layouts
            on_cpu = auto_axes(on_cpu, out_sharding=sharding)
        return lax.platform_dependent(*operands, cpu=on_cpu, default=plain)

    terms = []
    if not isinstance(x_dot, SymbolicZero):
        terms.append(term(_by_image, x_dot, kernel))
    if not isinstance(kernel_dot, SymbolicZero):
        terms.append(term(_by_kernel, x, kernel_dot))
    return output, sum(terms[1:], start=terms[0])


def _by_image(x: Array, kernel: Array, strides, padding, precision) -> Array:
    """The convolution; its transpose with respect to `x` is the image gradient."""
    size = _output(x, kernel, strides, padding).shape[1:3]
    if len(x) // _groups(x) * math.prod(size) > _FEW * kernel.shape[3]:
        kernel = jnp.swapaxes(kernel, 2, 3)
        return _lax_conv(x, kernel, strides, padding, precision, ("NHWC", "HWOI", "NHWC"))
    patches = _patches(_padded(x, padding), kernel.shape[:2], strides, size)
    return jnp.dot(patches, kernel.reshape(-1, kernel.shape[3]), precision=precision)


def _by_kernel(x: Array, kernel: Array, strides, padding, precision) -> Array:
    """The convolution, as the transpose of the filter gradient; so its transpose is that."""
    high, wide, channels, features = kernel.shape

    def gradient(dy: Array) -> Array:
        if strides != (1, 1) or features >= channels or x.shape[2] < _WIDE:
            return _correlation(_padded(x, padding), dy, (high, wide), strides, precision)
        (top, bottom), (left, right) = padding
        edges = ((high - 1 - top, high - 1 - bottom), (wide - 1 - left, wide - 1 - right))
        flipped = _correlation(_padded(dy, edges), x, (high, wide), strides, precision)
        return flipped[::-1, ::-1].swapaxes(2, 3)

    output = _output(x, kernel.astype(x.dtype), strides, padding)
    return jax.linear_transpose(gradient, output)(kernel.astype(_sum_dtype(x)))[0]


def _correlation(x: Array, y: Array, taps: Sequence[int], strides, precision) -> Array:
    """Σ x[i, j around the pixel] y[pixel], [*taps, channels of x, channels of y].

    The sum over pixels is taken in parts: `rows` rows of some images of each group. Each group has
    a sum of its own, so that devices that share a batch communicate once, after the loop.
    """
    (high, wide), channels, (batch, height, width, features) = taps, x.shape[3], y.shape
    patch, groups = high * wide * channels, _groups(y)
    pixels = min(_PATCHES // patch, _MOST_PIXELS)
    images = _divisor(batch // groups, at_most=pixels // (height * width))
    rows = _divisor(height, at_most=pixels // width)
    x = x.reshape(groups, -1, *x.shape[1:])
    starts = np.mgrid[0 : x.shape[1] : images, 0:height:rows].reshape(2, -1).T
    parts = y.reshape(groups, -1, images, height // rows, rows, width, features)
    parts = parts.transpose(1, 3, 0, 6, 2, 4, 5).reshape(len(starts), groups, features, -1)

    @partial(jax.checkpoint, prevent_cse=False)
    def step(total, part):
        y, start = part
        band = lax.dynamic_slice_in_dim(x, start[0], images, axis=1)
        rows_in = (rows - 1) * strides[0] + high
        band = lax.dynamic_slice_in_dim(band, start[1] * strides[0], rows_in, axis=2)
        patches = _patches(band, taps, strides, (rows, width)).reshape(groups, -1, patch)
        product = (((2,), (1,)), ((0,), (0,)))
        more = lax.dot_general(y, patches, product, precision=precision).swapaxes(1, 2)
        return total + more.astype(total.dtype), None

    total = jnp.zeros((groups, patch, features), _sum_dtype(y))
    total, _ = lax.scan(step, total, (parts, starts), reverse=True)
    return total.sum(0).reshape(high, wide, channels, features)


def _sum_dtype(x: Array) -> Any:
    return np.promote_types(x.dtype, np.float32)


def _groups(x: Array) -> int:
    """The number of groups, which divides both images and devices.

    It depends on the devices of the process, used or not: so does the rounding of gradients.
    """
    return math.gcd(len(x), jax.device_count())


def _padded(x: Array, padding: Padding) -> Array:
    """Zeros around the image; negative ones cut."""
    edges = [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _patches(x: Array, taps: Sequence[int], strides: Sequence[int], size: Sequence[int]) -> Array:
    """The inputs under the kernel at each output pixel, in the kernel's order on the last axis."""
    (high, wide), (down, right), (height, width) = taps, strides, size
    shifted = [
        x[..., i : i + height * down : down, j : j + width * right : right, :]
        for i, j in np.ndindex(high, wide)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _output(x: Array, kernel: Array, strides, padding) -> Any:
    return jax.eval_shape(lambda x, w: _lax_conv(x, w, strides, padding, None), x, kernel)


def _divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` up to `at_most`, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(at_most, 1))
