"""The convolution of all layers: XLA's own, with a derivative that its CPU backend runs as fast.

A convolution's two gradients are convolutions too, of the same arrays seen with other axes as
batch and channels. GPUs and TPUs choose layouts for themselves. XLA's CPU backend is fast for one
layout alone, NHWC with HWIO, into which it turns what it finds outside of loops only: inside a
scan a gradient takes 4 to 40 times as long, or more. And its filter gradients are slow everywhere.
Milliseconds on two AMD EPYC cores (Zen 5), images × size², channels in → out, of the gradients
as JAX derives them:

                                    filter gradient      image gradient
                                    in a scan  outside   in a scan  outside
    0.12.0.1   16 × 64², 64 → 128     >2250      128        529        21
               16 × 64², 128 → 64     >2250       58        512        31
                4 × 32², 128 → 128      166      6.9         67       3.0
                4 × 4², 256 → 256       2.3      0.6        3.2       0.8
    0.10.2     16 × 64², 64 → 128     >2250       96         66        63
                4 × 32², 128 → 128      160      5.9        7.6       2.9

With those below, a scan of ten steps of `SimpleUNet`, 16 images at 64×64, takes 161 ms for each
over two devices on 0.12.0.1. (Those two filter gradients alone would be 4,500.)

So on a CPU the derivative is written as the functions below, whose transposes are what runs
backwards. It is a JVP, not a VJP, so that forward mode and higher derivatives remain.

The filter gradient is a product of matrices, summed over a few hundred pixels at a time:

    dw[i, j] = Σ x[i, j around the pixel]ᵀ dy[pixel]

where the side with fewer channels is the one whose neighbourhoods (`_patches`) are laid out. The
image gradient is a convolution, but a product too where pixels are few, since turning the whole
kernel round would take longer than the rest.
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
"""Numbers of a part's patches, and its pixels: with a kernel and its gradient, a core's cache."""

_WIDE = 32
"""Rows of fewer pixels are too short to be laid out one by one."""

_FEW = 2
"""Up to so many output pixels for each output channel, adding up the gradients of their patches
takes less time than turning the kernel round."""

Padding = tuple[tuple[int, int], ...]


def conv_general_dilated(
    lhs: Array, rhs: Array, window_strides: Sequence[int], padding: Any, **options: Any
) -> Array:
    """`lax.conv_general_dilated` for NHWC images and HWIO kernels, as `flax.linen.Conv` calls it.

    Raises `ValueError` for dilations and groups: no layer here has any.
    """
    precision = options.pop("precision", None)
    layout = lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    given = options.pop("dimension_numbers", None) or layout
    if lax.conv_dimension_numbers(lhs.shape, rhs.shape, given) != layout:
        raise ValueError(f"dimension_numbers: expected NHWC and HWIO, got {given}")
    for name, value in options.items():
        if any(each != 1 for each in np.atleast_1d(value)):
            raise ValueError(f"{name}: expected 1, got {value}")
    _, height, width, _ = lhs.shape
    if isinstance(padding, str):
        padding = lax.padtype_to_pads((height, width), rhs.shape[:2], window_strides, padding)
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
        if AxisType.Explicit in sharding.mesh.axis_types:  # whose rules know no such layouts
            on_cpu = auto_axes(on_cpu, out_sharding=sharding)
        return lax.platform_dependent(*operands, cpu=on_cpu, default=plain)

    terms = []
    if not isinstance(x_dot, SymbolicZero):
        terms.append(term(_by_image, x_dot, kernel))
    if not isinstance(kernel_dot, SymbolicZero):
        terms.append(term(_by_kernel, x, kernel_dot))
    return output, sum(terms[1:], start=terms[0])


def _by_image(x: Array, kernel: Array, strides, padding, precision) -> Array:
    """The convolution, whose transpose by `x` is the image gradient."""
    size = _output_size(x, kernel, strides, padding)
    if len(x) // _groups(x) * math.prod(size) > _FEW * kernel.shape[3]:
        kernel = jnp.swapaxes(kernel, 2, 3)
        return _lax_conv(x, kernel, strides, padding, precision, ("NHWC", "HWOI", "NHWC"))
    patches = _patches(_padded(x, padding), kernel.shape[:2], strides, size)
    return jnp.dot(patches, kernel.reshape(-1, kernel.shape[3]), precision=precision)


def _by_kernel(x: Array, kernel: Array, strides, padding, precision) -> Array:
    """The convolution, whose transpose by `kernel` is the filter gradient."""
    if kernel.dtype.itemsize < 4:
        kernel = kernel.astype(jnp.float32)  # what the parts are summed into
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
    parts = parts.reshape(-1, groups, features, images, rows, width)
    return _join(parts, len(x), height // rows)


def _with_patches_of_output(x, kernel, padding, precision) -> Array:
    """The same, of stride 1, as each pixel of x adds to the outputs around it.

    Rows of x in a part add to more rows of y; where those of two parts meet, they are added up.
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
    # Of the outputs that x reaches, those that the padding leaves.
    edges = [
        (before - taps + 1, after - taps + 1)
        for taps, (before, after) in zip((high, wide), padding, strict=True)
    ]
    return _padded(y, edges)


def _part(x: Array, size: Sequence[int], patch: int) -> tuple[int, int, int]:
    """How a sum over pixels is cut: groups of images, images of each in a part, and their rows.

    As many groups as divide images and devices alike, each with a copy of the kernel: read
    backwards, devices that share a batch meet once, after the loop.
    """
    height, width = size
    pixels = min(_PATCHES // patch, _MOST_PIXELS)
    groups = _groups(x)
    images = _divisor(len(x) // groups, at_most=pixels // (height * width))
    return groups, images, _divisor(height, at_most=pixels // width)


def _groups(x: Array) -> int:
    return math.gcd(len(x), jax.device_count())


def _join(parts: Array, batch: int, blocks: int) -> Array:
    """[parts, groups, features, images, rows, width] as [batch, height, width, features]."""
    *_, features, _, rows, width = parts.shape
    parts = parts.reshape(-1, blocks, *parts.shape[1:]).transpose(2, 0, 4, 1, 5, 6, 3)
    return parts.reshape(batch, blocks * rows, width, features)


def _dot(kernels: Array, x: Array, precision) -> Array:
    """[groups, m, pixels] from [groups, n, m] and [groups, pixels, n].

    Pixels come last: summing over the last axis of the left side is the fastest product.
    """
    product = (((1,), (2,)), ((0,), (0,)))
    return lax.dot_general(kernels.astype(x.dtype), x, product, precision=precision)


def _at(offset: Sequence[int], x: Array, *, whole: Sequence[int]) -> Array:
    """`x` at `offset` in zeros, `whole` pixels high and wide, which are its last axes."""
    edges = [
        (start, size - length - start, 0)
        for start, length, size in zip(offset, x.shape[-2:], whole, strict=True)
    ]
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0)] * (x.ndim - 2) + edges)


def _padded(x: Array, padding: Sequence[Sequence[int]]) -> Array:
    return lax.pad(
        x,
        jnp.zeros((), x.dtype),
        [(0, 0, 0), *((low, high, 0) for low, high in padding), (0, 0, 0)],
    )


def _patches(x: Array, taps: Sequence[int], strides: Sequence[int], size: Sequence[int]) -> Array:
    """What lies under the kernel at each output pixel: last, and in the kernel's order."""
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
    """The largest there is, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(at_most, 1))
