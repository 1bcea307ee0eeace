"""The convolution of all layers: XLA's own, with a derivative that CPUs run as fast.

A convolution's two gradients are convolutions too, of the same arrays seen with other axes as
batch and channels. GPUs and TPUs choose layouts for themselves. XLA's CPU backend is fast for one
layout alone, NHWC with HWIO, into which it turns what it finds outside of loops only: inside a
scan the gradients were 30 times slower (jax 0.10). And the filter gradient is a product with as
many columns as the output has channels: where those are three, as in the layer that ends a U-Net,
it was ten times slower than the same with rows and columns exchanged. And where images are large
it leaves the cache: a few rows of all images at a time take half of its time or less.

So on a CPU the derivative is written, array by array, in the layout whose transpose is NHWC with
HWIO: the transposes of `by_x` and `by_kernel` are what runs backwards. It is a JVP, not a VJP, so
that forward mode and higher derivatives remain; forwards those layouts are the slow ones, several
times slower than XLA's own.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array

__all__ = ["conv_general_dilated"]

_THIN = 16
"""Fewer columns than these leave a matrix product's units idle."""

_LARGE = 32 * 32
"""Pixels of a large image."""

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
        return conv(x_dot, jnp.swapaxes(kernel, 2, 3), layout=("NHWC", "HWOI", "NHWC"))

    def by_kernel(x, kernel_dot):
        channels, features = kernel.shape[2:]
        if rows := _rows_at_once(x.shape, kernel.shape, strides, padding):
            return _by_rows(x, kernel_dot, padding, precision, rows)
        if strides == (1, 1) and _columns(channels) < _columns(features):
            return _exchanged(x, kernel_dot, padding, precision)
        x, kernel_dot = x.transpose(3, 1, 2, 0), kernel_dot.transpose(2, 0, 1, 3)
        return conv(x, kernel_dot, layout=("CHWN", "IHWO", "HWNC")).transpose(2, 0, 1, 3)

    terms = []
    if not isinstance(x_dot, SymbolicZero):
        terms.append(lax.platform_dependent(x_dot, kernel, cpu=by_x, default=conv))
    if not isinstance(kernel_dot, SymbolicZero):
        terms.append(lax.platform_dependent(x, kernel_dot, cpu=by_kernel, default=conv))
    return _conv(x, kernel, strides, padding, precision), sum(terms[1:], start=terms[0])


def _rows_at_once(
    shape: Sequence[int], taps: Sequence[int], strides: tuple[int, ...], padding: Padding
) -> int | None:
    """How many rows make patches that fit the cache, where images outgrow it and a kernel for
    each of them does not."""
    height, width = (
        size + low + high - count + 1
        for size, count, (low, high) in zip(shape[1:3], taps[:2], padding, strict=True)
    )
    thin, fat = sorted(taps[2:])
    if strides != (1, 1) or height * width < _LARGE or thin < _THIN or thin * fat > _LARGE * _THIN:
        return None
    pixels = range(_LARGE // 8, _LARGE // 2)
    rows = (r for r in range(1, height) if height % r == 0 and r * width in pixels)
    return next(rows, 1 if width >= _LARGE // 2 else None)


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


def _by_rows(x: Array, kernel: Array, padding: Padding, precision, rows: int) -> Array:
    """The same as a product of patches and kernel, for a few rows of all images at a time.

    Every image has a copy of the kernel, so that read backwards the images are summed once, after
    the loop, and devices that share a batch meet once.
    """
    count = len(x)
    taps_high, taps_wide, _, features = kernel.shape
    x = lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *((*p, 0) for p in padding), (0, 0, 0)])
    height, width = x.shape[1] - taps_high + 1, x.shape[2] - taps_wide + 1
    flat = kernel.reshape(-1, features).T
    if flat.dtype.itemsize < 4:
        flat = flat.astype(jnp.float32)  # what the loop sums into
    kernels = jnp.broadcast_to(flat, (count, *flat.shape))

    @partial(jax.checkpoint, prevent_cse=False)
    def step(kernels, first):
        part = lax.dynamic_slice_in_dim(x, first, rows + taps_high - 1, axis=1)
        shifted = [
            part[:, i : i + rows, j : j + width] for i in range(taps_high) for j in range(taps_wide)
        ]
        patches = jnp.concatenate(shifted, axis=-1).reshape(count, rows * width, -1)
        product = (((2,), (2,)), ((0,), (0,)))
        y = lax.dot_general(patches, kernels.astype(x.dtype), product, precision=precision)
        return kernels, y.reshape(count, rows, width, features)

    y = lax.scan(step, kernels, jnp.arange(0, height, rows))[1]
    return jnp.swapaxes(y, 0, 1).reshape(count, height, width, features)
