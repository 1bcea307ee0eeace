"""The convolution of all layers: XLA's own, with a derivative that CPUs run as fast.

A convolution's two gradients are convolutions too, of the same arrays seen with other axes as
batch and channels. GPUs and TPUs choose layouts for themselves. XLA's CPU backend is fast for one
layout alone, NHWC with HWIO, into which it turns what it finds outside of loops only: inside a
scan the gradients were 30 times slower (jax 0.10). And the filter gradient is a product with as
many columns as the output has channels: where those are three, as in the layer that ends a U-Net,
it was ten times slower than the same with rows and columns exchanged. Where images are large it
leaves the cache, and where they are tiny, or the kernel is one pixel, it was twice as slow as a
product of matrices: there it is one, of a few hundred pixels at a time. The image's gradient turns
the whole kernel round, which takes longer than the rest where pixels are few: there too it is a
product, and the gradients of its patches are added up.

So on a CPU the derivative is written, array by array, in the layout whose transpose is NHWC with
HWIO: the transposes of `by_x` and `by_kernel` are what runs backwards. It is a JVP, not a VJP, so
that forward mode and higher derivatives remain; forwards those layouts are the slow ones, several
times slower than XLA's own.
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

__all__ = ["conv_general_dilated"]

_THIN = 16
"""Fewer columns than these leave a matrix product's units idle."""

_TINY, _LARGE = 4 * 4, 32 * 32
"""Pixels of the images between which XLA's own filter gradient is fast."""

_FEW = 2
"""Up to so many output pixels for each output channel, adding up the gradients of their patches
takes less time than turning the kernel round."""

_PIXELS = 256
"""So many at once: their patches, a kernel and its gradient fit a core's cache."""

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
    conv = partial(_lax_conv, strides=strides, padding=padding, precision=precision)
    (x, kernel), (x_dot, kernel_dot) = primals, tangents

    def by_x(x_dot, kernel):
        if _suits_product(x, kernel, strides, padding):
            return _product(x_dot, kernel, strides, padding, precision)
        return conv(x_dot, jnp.swapaxes(kernel, 2, 3), layout=("NHWC", "HWOI", "NHWC"))

    def by_kernel(x, kernel_dot):
        channels, features = kernel.shape[2:]
        if _suits_parts(x, kernel, strides, padding):
            return _in_parts(x, kernel_dot, strides, padding, precision)
        if strides == (1, 1) and _columns(channels) < _columns(features):
            return _exchanged(x, kernel_dot, padding, precision)
        x, kernel_dot = x.transpose(3, 1, 2, 0), kernel_dot.transpose(2, 0, 1, 3)
        return conv(x, kernel_dot, layout=("CHWN", "IHWO", "HWNC")).transpose(2, 0, 1, 3)

    output = _conv(x, kernel, strides, padding, precision)
    sharding = jax.typeof(output).sharding

    def term(on_cpu, *operands):
        if AxisType.Explicit in sharding.mesh.axis_types:  # whose rules know no such layouts
            on_cpu = auto_axes(on_cpu, out_sharding=sharding)
        return lax.platform_dependent(*operands, cpu=on_cpu, default=conv)

    terms = []
    if not isinstance(x_dot, SymbolicZero):
        terms.append(term(by_x, x_dot, kernel))
    if not isinstance(kernel_dot, SymbolicZero):
        terms.append(term(by_kernel, x, kernel_dot))
    return output, sum(terms[1:], start=terms[0])


def _suits_product(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding) -> bool:
    height, width = _output_size(x, kernel, strides, padding)
    few = len(x) // _groups(x) * height * width <= _FEW * kernel.shape[3]
    return few and min(kernel.shape[2:]) >= _THIN


def _suits_parts(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding) -> bool:
    height, width = _output_size(x, kernel, strides, padding)
    extreme = kernel.shape[:2] == (1, 1) or not _TINY < height * width < _LARGE
    return extreme and min(kernel.shape[2:]) >= _THIN


def _groups(x: Array) -> int:
    """The most that divide the images and the devices alike."""
    return math.gcd(len(x), jax.device_count())


def _output_size(x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding) -> list[int]:
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    return [(size + low + high - taps) // stride + 1 for size, taps, stride, (low, high) in sizes]


def _columns(count: int) -> tuple[bool, int]:
    """Ranks the columns of a product: the fewest are fastest, unless they are too few."""
    return count < _THIN, count


def _exchanged(x: Array, kernel: Array, padding: Padding, precision) -> Array:
    """The same with image and kernel in each other's place: a correlation, read backwards.

    y[h] = Σ_i w[i] x[h + i - low] = Σ_m w[k + m - P] x[m]   at k = H' - 1 - h
    """
    paddings = [
        (size + high - taps, size + low - taps)
        for size, taps, (low, high) in zip(x.shape[1:3], kernel.shape[:2], padding, strict=True)
    ]
    backwards = _lax_conv(
        kernel.transpose(3, 0, 1, 2),
        x.transpose(1, 2, 0, 3),
        (1, 1),
        paddings,
        precision,
        layout=("NHWC", "HWOI", "NHWC"),
    )
    return backwards[:, ::-1, ::-1].transpose(3, 1, 2, 0)


def _product(
    x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding, precision
) -> Array:
    """The same as a product of patches and kernel, for all pixels at once."""
    size = _output_size(x, kernel, strides, padding)
    patches = _patches(_padded(x, padding), kernel.shape[:2], strides, size)
    return jnp.dot(patches, kernel.reshape(-1, kernel.shape[3]), precision=precision)


def _in_parts(
    x: Array, kernel: Array, strides: tuple[int, ...], padding: Padding, precision
) -> Array:
    """The same as a product of kernel and patches: of a few rows, or a few images, at a time.

    Images are taken in as many groups as there are devices, each with a copy of the kernel: read
    backwards, devices that share a batch meet once, after the loop. That product has its summed
    axis last on the left, as XLA's fastest must: pixels are last in what the loop returns.
    """
    height, width = _output_size(x, kernel, strides, padding)
    high, _, _, features = kernel.shape
    groups = _groups(x)
    images = _divisor(len(x) // groups, at_most=_PIXELS // (height * width))
    rows = _divisor(height, at_most=_PIXELS // width)
    x = _padded(x, padding)
    x = x.reshape(groups, len(x) // groups, *x.shape[1:])
    flat = kernel.reshape(-1, features).T
    if flat.dtype.itemsize < 4:
        flat = flat.astype(jnp.float32)  # what the loop sums into
    kernels = jnp.broadcast_to(flat, (groups, *flat.shape))
    starts = np.mgrid[0 : x.shape[1] : images, 0:height:rows]
    down = strides[0]

    @partial(jax.checkpoint, prevent_cse=False)
    def step(kernels, start):
        image, row = start
        part = lax.dynamic_slice_in_dim(x, image, images, axis=1)
        part = lax.dynamic_slice_in_dim(part, row * down, (rows - 1) * down + high, axis=2)
        patches = _patches(part, kernel.shape[:2], strides, (rows, width))
        patches = patches.reshape(groups, images * rows * width, -1)
        product = (((2,), (2,)), ((0,), (0,)))
        y = lax.dot_general(kernels.astype(x.dtype), patches, product, precision=precision)
        return kernels, y

    y = lax.scan(step, kernels, starts.reshape(2, -1).T)[1]
    y = y.reshape(*starts.shape[1:], groups, features, images, rows, width)
    return y.transpose(2, 0, 4, 1, 5, 6, 3).reshape(-1, height, width, features)


def _padded(x: Array, padding: Padding) -> Array:
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])


def _patches(x: Array, taps: Sequence[int], strides: Sequence[int], size: Sequence[int]) -> Array:
    """What lies under the kernel at each output pixel: last, and in the kernel's order."""
    (high, wide), (down, right), (height, width) = taps, strides, size
    shifted = [
        x[..., i : i + height * down : down, j : j + width * right : right, :]
        for i in range(high)
        for j in range(wide)
    ]
    return jnp.concatenate(shifted, axis=-1)


def _divisor(number: int, *, at_most: int) -> int:
    """The largest there is, or 1."""
    return max(n for n in range(1, number + 1) if number % n == 0 and n <= max(at_most, 1))
