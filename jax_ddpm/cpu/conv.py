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

The neighbourhoods (`_patches`) are those of the side with fewer channels. The image gradient is a
convolution, or for few pixels also a product, where flipping the kernel would dominate the time.
"""

import math
from collections.abc import Sequence
from functools import partial, reduce
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
        if any(each != 1 for each in np.atleast_1d(value)):
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
    size = _output_size(x, kernel, strides, padding)
    if len(x) // _groups(x) * math.prod(size) > _FEW * kernel.shape[3]:
        kernel = jnp.swapaxes(kernel, 2, 3)
        return _lax_conv(x, kernel, strides, padding, precision, ("NHWC", "HWOI", "NHWC"))
    patches = _patches(_padded(x, padding), kernel.shape[:2], strides, size)
    return jnp.dot(patches, kernel.reshape(-1, kernel.shape[3]), precision=precision)


def _by_kernel(x: Array, kernel: Array, strides, padding, precision) -> Array:
    """The convolution; its transpose with respect to `kernel` is the filter gradient."""
    if kernel.dtype.itemsize < 4:
        kernel = kernel.astype(jnp.float32)  # the dtype of the sum over parts
    channels, features = kernel.shape[2:]
    if strides == (1, 1) and features < channels and x.shape[2] >= _WIDE:
        return _with_patches_of_output(x, kernel, padding, precision)
    size = _output_size(x, kernel, strides, padding)
    return _with_patches_of_input(x, kernel, strides, padding, precision, size)


def _with_patches_of_input(x, kernel, strides, padding, precision, size) -> Array:
    (high, wide, channels, features), (height, width) = kernel.shape, size
    groups, images, rows = _part(x, size, high * wide * channels)
    flat = jnp.broadcast_to(kernel.reshape(-1, features), (groups, kernel[..., 0].size, features))
    padded = _padded(x, padding)
    padded = padded.reshape(groups, -1, *padded.shape[1:])
    starts = np.mgrid[0 : padded.shape[1] : images, 0:height:rows].reshape(2, -1).T

    @partial(jax.checkpoint, prevent_cse=False)
    def step(flat, start):
        part = lax.dynamic_slice_in_dim(padded, start[0], images, axis=1)
        rows_in = (rows - 1) * strides[0] + high
        part = lax.dynamic_slice_in_dim(part, start[1] * strides[0], rows_in, axis=2)
        patches = _patches(part, (high, wide), strides, (rows, width))
        return flat, _dot(flat, patches.reshape(groups, -1, flat.shape[1]), precision)

    parts = lax.scan(step, flat, starts)[1]
    parts = parts.reshape(-1, height // rows, groups, features, images, rows, width)
    return parts.transpose(2, 0, 4, 1, 5, 6, 3).reshape(len(x), height, width, features)


def _with_patches_of_output(x, kernel, padding, precision) -> Array:
    """The same for stride 1: each pixel of x adds to the outputs around it.

    The rows of a part add to a larger band of output rows; overlapping bands are summed.
    """
    (high, wide, channels, features), (batch, height, width, _) = kernel.shape, x.shape
    groups, images, rows = _part(x, (height, width), high * wide * features)
    flat = kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(channels, -1)
    flat = jnp.broadcast_to(flat, (groups, *flat.shape))

    @partial(jax.checkpoint, prevent_cse=False)
    def step(flat, part):
        patches = _dot(flat, part.reshape(groups, -1, channels), precision)
        patches = patches.reshape(groups, high * wide, features, images, rows, width)
        taps = (tap[:, 0] for tap in jnp.split(patches, high * wide, axis=1))
        whole = (rows + high - 1, width + wide - 1)
        return flat, reduce(jnp.add, map(partial(_at, whole=whole), np.ndindex(high, wide), taps))

    parts = x.reshape(groups, -1, images, height // rows, rows, width, channels)
    parts = parts.transpose(1, 3, 0, 2, 4, 5, 6)
    windows = lax.scan(step, flat, parts.reshape(-1, *parts.shape[2:]))[1]
    windows = windows.reshape(-1, height // rows, *windows.shape[1:])
    bands = (band[:, 0] for band in jnp.split(windows, height // rows, axis=1))
    offsets = ((start, 0) for start in range(0, height, rows))
    whole = (height + high - 1, width + wide - 1)
    y = reduce(jnp.add, map(partial(_at, whole=whole), offsets, bands))
    y = y.transpose(1, 0, 3, 4, 5, 2).reshape(batch, *y.shape[-2:], features)
    # Padding decides which of the outputs that x reaches exist.
    (top, bottom), (left, right) = padding
    edges = ((top - high + 1, bottom - high + 1), (left - wide + 1, right - wide + 1))
    return _padded(y, edges)


def _part(x: Array, size: Sequence[int], patch: int) -> tuple[int, int, int]:
    """The split of a sum over pixels: groups of images, images of a group in a part, and rows.

    Each group has a copy of the kernel, so that in the backward pass devices that share a batch
    communicate once, after the loop.
    """
    height, width = size
    pixels = min(_PATCHES // patch, _MOST_PIXELS)
    groups = _groups(x)
    images = _divisor(len(x) // groups, at_most=pixels // (height * width))
    return groups, images, _divisor(height, at_most=pixels // width)


def _groups(x: Array) -> int:
    """The number of groups, which divides both images and devices.

    It depends on the devices of the process, used or not: so does the rounding of gradients.
    """
    return math.gcd(len(x), jax.device_count())


def _dot(kernels: Array, x: Array, precision) -> Array:
    """[groups, m, pixels] from [groups, n, m] and [groups, pixels, n], the fastest order."""
    product = (((1,), (2,)), ((0,), (0,)))
    return lax.dot_general(kernels.astype(x.dtype), x, product, precision=precision)


def _at(offset: Sequence[int], x: Array, *, whole: Sequence[int]) -> Array:
    """`x` at `offset` in an array of zeros, whose last axes have the size `whole`."""
    places = zip(offset, x.shape[-2:], whole, strict=True)
    edges = [(start, size - length - start) for start, length, size in places]
    return _padded(x, edges, first=x.ndim - 2)


def _padded(x: Array, padding: Sequence[Sequence[int]], first: int = 1) -> Array:
    """Zeros around two axes; negative ones cut."""
    (top, bottom), (left, right) = padding
    edges = [(0, 0, 0)] * x.ndim
    edges[first : first + 2] = [(top, bottom, 0), (left, right, 0)]
    return lax.pad(x, jnp.zeros((), x.dtype), edges)


def _patches(x: Array, taps: Sequence[int], strides: Sequence[int], size: Sequence[int]) -> Array:
    """The inputs under the kernel at each output pixel, in the kernel's order on the last axis."""
    (high, wide), (down, right), (height, width) = taps, strides, size
    shifted = [
        x[..., i : i + height * down : down, j : j + width * right : right, :]
        for i, j in np.ndindex(high, wide)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _output_size(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding) -> list[int]:
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    return [(size + low + high - taps) // stride + 1 for size, taps, stride, (low, high) in sizes]


def _divisor(number: int, *, at_most: int) -> int:
    """The largest divisor of `number` up to `at_most`, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(at_most, 1))
