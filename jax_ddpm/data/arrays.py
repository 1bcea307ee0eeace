"""Images in NumPy's files: .npy, left on the disk where it is large, and .npz."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._checks import FieldError
from jax_ddpm.data.dataset import check_finite
from jax_ddpm.data.pictures import reason
from jax_ddpm.data.rows import FileRows

__all__ = ["Arrays", "read_arrays"]

_IN_MEMORY = 2**28
"""Bytes. A .npy up to this size is read whole; a larger one of uint8 stays on the disk, and must
not change while it is in use."""
_ROUNDING = 1e-6
"""How far a pixel may leave its range: what was scaled in float32 comes back off by 1e-7."""


class Arrays(NamedTuple):
    """What a file holds, as a `Dataset` has it."""

    images: Any
    labels: np.ndarray | None
    notes: tuple[str, ...]


def read_arrays(path: Path) -> Arrays:
    """Images [image, height, width(, channel)], uint8, or float in [0, 1] or [-1, 1], and labels.

    Integers of shape [image] or [image, 1] beside the images in a .npz are labels. Raises
    `FieldError` naming what cannot be read or has another form.
    """
    images, labels = _load(path)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0:
        problem = "expected images of shape [image, height, width(, channel)]"
        raise FieldError("data", f"{problem}, got {images.shape} in {path}")
    if images.shape[-1] > 4:
        problem = "expected the channels last, 1 to 4 of them"
        raise FieldError("data", f"{problem}, got {images.shape} in {path}")
    if labels is not None and labels.shape != images.shape[:1]:
        raise FieldError(
            "data",
            f"expected a label for each of {len(images)} images in {path}, "
            f"got shape {labels.shape}",
        )
    if labels is not None and labels.min() < 0:
        raise FieldError("data", f"expected labels from 0 in {path}, got {labels.min()}")
    if images.dtype == np.uint8:
        notes = _notes_of_bytes(images)
        images = FileRows.of_array(images) if isinstance(images, np.memmap) else images
        return Arrays(images, labels, notes)
    signed, notes = _to_signed(np.asarray(images), path)
    return Arrays(signed, labels, notes)


def _load(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        if path.suffix == ".npy" and path.stat().st_size > _IN_MEMORY:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped if mapped.flags.c_contiguous else np.array(mapped), None
        with path.open("rb") as file:  # NumPy leaves a damaged one open
            loaded: Any = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded, None
            # Of drawn samples (`runs.save_samples`) arr_0 holds the same again, rounded.
            twins = {"arr_0"} if {"arr_0", "samples"} <= set(loaded.files) else set()
            twins |= {"class_names"}  # which `open_samples` reads
            arrays = {name: loaded[name] for name in loaded.files if name not in twins}
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        raise FieldError("data", f"cannot read {path}: {reason(error)}") from None
    images = [array for array in arrays.values() if array.ndim in (3, 4)]
    labels = [array for array in arrays.values() if array.ndim == 1 or array.shape[1:] == (1,)]
    if len(images) != 1 or len(labels) > 1 or len(arrays) > len(images) + len(labels):
        got = ", ".join(f"{name} {each.dtype}{list(each.shape)}" for name, each in arrays.items())
        problem = "expected one array of images and at most one of labels [image], of whole numbers"
        raise FieldError("data", f"{problem}, in {path}, got {got}")
    if labels and not np.issubdtype(labels[0].dtype, np.integer):
        raise FieldError("data", f"expected integer labels in {path}, got {labels[0].dtype}")
    if labels and labels[0].size:
        bounds, ends = np.iinfo(np.int32), (int(labels[0].min()), int(labels[0].max()))
        if wrong := [end for end in ends if not bounds.min <= end <= bounds.max]:
            raise FieldError("data", f"expected labels of 32 bits in {path}, got {wrong[0]}")
    return images[0], labels[0].reshape(-1).astype(np.int32) if labels else None


def _notes_of_bytes(images: np.ndarray) -> tuple[str, ...]:
    # The first rows tell: masks hold nothing else anywhere.
    if images[:1000].max() > 1 or images.max() > 1:
        return ()
    return ("no pixel is above 1 of 255: masks of 0 and 1 have to be times 255",)


def _to_signed(images: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Float images in [-1, 1], and what was taken for granted."""
    if not np.issubdtype(images.dtype, np.floating):
        raise FieldError("data", f"expected uint8 or float images, got {images.dtype} in {path}")
    check_finite(images, str(path))
    low, high = float(images.min()), float(images.max())
    rounding = max(_ROUNDING, 4 * float(np.finfo(images.dtype).eps))
    for bottom in (0, -1):
        if bottom - rounding <= low and high <= 1 + rounding:
            images = np.clip(images, bottom, 1)
            signed = images if bottom else images * 2 - 1
            return signed.astype(np.float32), (f"pixels in [{bottom}, 1]",)
    problem = "expected float pixels in [0, 1] or [-1, 1]"
    raise FieldError("data", f"{problem}, got [{low:.9g}, {high:.9g}] in {path}")
