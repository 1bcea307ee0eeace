"""Images in NumPy's files: .npy, left on the disk where it is large, and .npz."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._checks import Field, FieldError
from jax_ddpm.data.dataset import Dataset, check_finite, numbered, split_of, to_bytes
from jax_ddpm.data.pictures import reason
from jax_ddpm.data.preparation import Preparation
from jax_ddpm.data.rows import FileRows

__all__ = ["read_arrays", "read_labels"]

_IN_MEMORY = 2**28
"""Bytes. A .npy up to this size is read whole; a larger one of uint8 stays on the disk, and must
not change while it is in use."""
_ROUNDING = 1e-6
"""How far a pixel may leave its range: what was scaled in float32 comes back off by 1e-7."""


_RANGES = {"unit": 0, "signed": -1}


def read_arrays(path: Path, preparation: Preparation) -> Dataset:
    """Images [image, height, width(, channel)], uint8, or float in [0, 1] or [-1, 1], and labels.

    Integers of shape [image] or [image, 1] beside the images in a .npz are labels; of several parts
    that for training is read. Raises `FieldError` naming what cannot be read or has another form.
    """
    images, labels, in_bytes, notes = _load(path, preparation.labels == "folders")
    shape, names = list(images.shape), None
    where = f"got {shape} in {path}"
    if len(shape) not in (3, 4) or images.size == 0:
        expected = "expected images of shape [image, height, width(, channel)]"
        raise FieldError("data", f"{expected}, {where}")
    if len(shape) == 3 and ((shape[-1] <= 4 and shape[1] != shape[2]) or shape[0] == 3):
        problem = "expected [image, height, width, channel] and not one picture"
        raise FieldError("data", f"{problem}, {where}: add an axis")
    images = images[..., None] if len(shape) == 3 else images
    if images.shape[-1] > 4:
        raise FieldError("data", f"expected the channels last, 1 to 4 of them, {where}")
    if labels is not None:
        if labels.shape != images.shape[:1]:
            problem = f"expected a label for each of {len(images)} images in {path}"
            raise FieldError("data", f"{problem}, got shape {labels.shape}")
        labels, names, said = read_labels(labels, str(path))
        notes += said
    if images.dtype == np.uint8:
        notes += _notes_of_bytes(images)
        images = FileRows.of_array(images) if isinstance(images, np.memmap) else images
        return Dataset(images, labels, notes=notes, class_names=names)
    signed, taken, said = _to_signed(np.asarray(images), path, preparation.range, in_bytes)
    how = Preparation(range=taken)
    return Dataset(signed, labels, notes=notes + said, class_names=names, preparation=how)


def read_labels(
    labels: np.ndarray, where: str
) -> tuple[np.ndarray, tuple[str, ...] | None, tuple[str, ...]]:
    """Whole numbers as int32 labels. Where some are missing between 0 and the largest, they are the
    names of the classes, and a line says so."""
    if labels.min() < 0:
        raise FieldError("data", f"expected labels from 0 in {where}, got {labels.min()}")
    if int(labels.max()) < len(np.unique(labels)):
        return labels.astype(np.int32), None, ()
    labels, names, said = numbered(list(map(str, labels.tolist())), "label")
    return labels, names, (said,)


def _load(path: Path, labelled: bool) -> tuple[np.ndarray, Any, Any, tuple[str, ...]]:
    """Images, labels, of samples drawn here the same images as bytes, and what is left out."""
    arrays: dict[str, np.ndarray] = {}
    try:
        if path.suffix == ".npy" and path.stat().st_size > _IN_MEMORY:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            return mapped if mapped.flags.c_contiguous else np.array(mapped), None, None, ()
        with path.open("rb") as file:  # NumPy leaves a damaged one open
            loaded: Any = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded, None, None, ()
            parts = {name: split_of(name) for name in loaded.files}
            others = [name for name in parts if parts[name] not in (None, "train")]
            others = others if "train" in parts.values() else []
            # `open_samples` reads the names.
            for name in [name for name in loaded.files if name not in (*others, "class_names")]:
                with suppress(*() if labelled else (ValueError,)):  # pickled labels
                    arrays[name] = loaded[name]
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        raise FieldError("data", f"cannot read {path}: {reason(error)}") from None
    in_bytes = arrays.pop("arr_0", None) if "samples" in arrays else None  # of `save_samples`
    images = [array for array in arrays.values() if array.ndim in (3, 4)]
    labels = [array for array in arrays.values() if array.ndim == 1 or array.shape[1:] == (1,)]
    unknown = len(arrays) > len(images) + len(labels) or len(labels) > 1
    if len(images) != 1 or (labelled and unknown):
        got = ", ".join(f"{name} {each.dtype}{list(each.shape)}" for name, each in arrays.items())
        problem = "expected one array of images and at most one of labels [image], of whole numbers"
        raise FieldError("data", f"{problem}, in {path}, got {got}")
    if labelled and labels and not np.issubdtype(labels[0].dtype, np.integer):
        raise FieldError("data", f"expected integer labels in {path}, got {labels[0].dtype}")
    notes = (f"other parts of the data, left out: {', '.join(others)}",) if others else ()
    return images[0], labels[0].reshape(-1) if labels and labelled else None, in_bytes, notes


def _notes_of_bytes(images: np.ndarray) -> tuple[str, ...]:
    # The first rows tell: masks hold nothing else anywhere.
    if images[:1000].max() > 1 or images.max() > 1:
        return ()
    return ("no pixel is above 1 of 255: masks of 0 and 1 have to be times 255",)


def _to_signed(
    images: np.ndarray, path: Path, given: Any, in_bytes: np.ndarray | None
) -> tuple[np.ndarray, Any, tuple[str, ...]]:
    """Float images in [-1, 1], the range that they were taken for, and what to say of it."""
    if not np.issubdtype(images.dtype, np.floating):
        raise FieldError("data", f"expected uint8 or float images, got {images.dtype} in {path}")
    check_finite(images, str(path))
    low, high = float(images.min()), float(images.max())
    got = f"got [{low:.9g}, {high:.9g}] in {path}"
    rounding = max(_ROUNDING, 4 * float(np.finfo(images.dtype).eps))
    fits = [name for name, least in _RANGES.items() if min(low - least, 1 - high) >= -rounding]
    if in_bytes is not None and not np.array_equal(to_bytes(images), in_bytes):
        raise FieldError("data", f"expected arr_0 to hold the samples as bytes in {path}")
    given = "signed" if in_bytes is not None else given
    taken = given or next(iter(fits), "signed")
    note = f"pixels in [{_RANGES[taken]}, 1]"
    if in_bytes is not None and not fits:
        note = f"samples beyond [-1, 1], clipped as in arr_0: {got}"
    elif given is not None and given not in fits:
        problem = f"expected pixels in [{_RANGES[given]}, 1], as "
        raise FieldError("data", problem, Field("range", given), f" says, {got}")
    elif not fits:
        raise FieldError("data", f"expected float pixels in [0, 1] or [-1, 1], {got}")
    elif given is None and len(fits) == 2:
        note += ', since none is below 0; if they are in [-1, 1], the range is "signed"'
    images = np.clip(images, _RANGES[taken], 1)
    images = images if taken == "signed" else images * 2 - 1
    return images.astype(np.float32), taken, (note,)
