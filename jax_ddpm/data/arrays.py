"""Images in NumPy's files: .npy, mapped where it is large, and .npz."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import Field, FieldError, described
from jax_ddpm.data.dataset import Dataset, Labelling, Preparation, numbered, to_bytes
from jax_ddpm.data.files import part_of, reason

_IN_MEMORY = 2**28
"""Bytes. A .npy up to this size is read whole; a larger one of uint8 stays on the disk, and must
not change while it is in use."""
_ROUNDING = 1e-6
"""How far a pixel may leave its range: what was scaled in float32 comes back off by 1e-7."""


def read_arrays(path: Path, preparation: Preparation) -> Dataset:
    """Images [image, height, width(, channel)], and labels [image] or [image, 1]; of several parts
    that for training. Raises `FieldError` naming what cannot be read or has another form."""
    labelled, names, taken = preparation.labels == "folders", None, None
    arrays, notes = _load(path, labelled)
    # Of `save_samples`: what the classes are called, and the samples as bytes.
    called, in_bytes = arrays.pop("class_names", None), None
    if {"samples", "arr_0"} <= arrays.keys() and arrays["samples"].shape == arrays["arr_0"].shape:
        in_bytes = arrays.pop("arr_0")
    pictures = [array for array in arrays.values() if array.ndim in (3, 4)]
    columns = [array for array in arrays.values() if array.ndim == 1 or array.shape[1:] == (1,)]
    unknown = len(arrays) > len(pictures) + len(columns) or len(columns) > 1
    if len(pictures) != 1 or (labelled and unknown):
        got = ", ".join(f"{name} {described(each)}" for name, each in arrays.items())
        expected = "one array of images [image, height, width(, channel)] and at most one of labels"
        raise _unexpected(f"{expected} [image]", path, got)
    (images,) = pictures
    got = f"got {list(images.shape)} in {path}"
    if images.ndim == 3:
        if len(images) == 3 or (images.shape[2] <= 4 and images.shape[1] != images.shape[2]):
            problem = "expected [image, height, width, channel] and not one picture"
            raise FieldError("data", f"{problem}, {got}: add an axis")
        images = images[..., None]
    if images.size == 0 or images.shape[-1] > 4:
        raise FieldError("data", f"expected one image or more, of 1 to 4 channels last, {got}")
    labels = columns[0].reshape(-1) if labelled and columns else None
    if labels is not None:
        if labels.shape != images.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
            expected = f"an integer label for each of {len(images)} images"
            raise _unexpected(expected, path, described(labels))
        labels, names, said = read_labels(labels, path, called)
        notes += said
    if images.dtype != np.uint8:
        images, taken, note = _to_signed(np.asarray(images), path, preparation.range, in_bytes)
        notes += (note,)
    elif images[:1000].max() <= 1 and images.max() <= 1:  # the first tell: masks are so anywhere
        notes += ("no pixel is above 1 of 255: masks of 0 and 1 have to be times 255",)
    how = Preparation(range=taken)
    return Dataset(images, labels, notes=notes, class_names=names, preparation=how)


def _unexpected(expected: str, where: object, got: object) -> FieldError:
    return FieldError("data", f"expected {expected} in {where}, got {got}")


def read_labels(labels: np.ndarray, where: object, called: np.ndarray | None = None) -> Labelling:
    """Where some numbers are missing between 0 and the largest, they are the names of classes."""
    if labels.min() < 0:
        raise _unexpected("labels from 0", where, labels.min())
    if called is not None:
        names, shown = tuple(called.astype(str).reshape(-1).tolist()), {*labels.tolist()}
        if (most := max(shown)) >= len(names):
            raise _unexpected(f"labels of the {len(names)} class_names", where, most)
        idle = ", ".join([name for k, name in enumerate(names) if k not in shown][:20])
        said = (f"classes that no image shows: {idle}",) if idle else ()
        return labels.astype(np.int32), names, said
    if int(labels.max()) < len(np.unique(labels)):
        return labels.astype(np.int32), None, ()
    return numbered(list(map(str, labels.tolist())), "label")


def _load(path: Path, labelled: bool) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """The arrays by their names, and which were left out, in a line."""
    arrays: dict[str, np.ndarray] = {}
    unusable = () if labelled else (ValueError,)  # pickled labels
    try:
        if path.suffix.lower() == ".npy" and path.stat().st_size > _IN_MEMORY:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            # In Fortran's order each pixel of an image is on another page.
            return {"images": mapped if mapped.flags.c_contiguous else np.array(mapped)}, ()
        with path.open("rb") as file:  # NumPy leaves a damaged one open
            loaded: Any = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return {"images": loaded}, ()
            parts = {name: part_of(name) for name in loaded.files}
            others = [name for name, part in parts.items() if part not in (None, "train")]
            others = others if "train" in parts.values() else []
            for name in [name for name in parts if name not in others]:
                with suppress(*unusable):
                    arrays[name] = loaded[name]
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        raise FieldError("data", f"cannot read {path}: {reason(error)}") from None
    return arrays, (f"other parts of the data, left out: {', '.join(others)}",) if others else ()


def _to_signed(
    images: np.ndarray, path: Path, given: Any, in_bytes: np.ndarray | None
) -> tuple[np.ndarray, Any, str]:
    """Float images in [-1, 1], the range that they were taken for, and what to say of it."""
    if not np.issubdtype(images.dtype, np.floating):
        raise _unexpected("uint8 or float images", path, images.dtype)
    wrong = np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))
    if len(wrong):
        got = f"NaN or infinity in {len(wrong)} of them, the first of them image {wrong[0]}"
        raise FieldError("data", f"expected finite pixels, got {got} in {path}")
    low, high = float(images.min()), float(images.max())
    got = f"got [{low:.9g}, {high:.9g}] in {path}"
    rounding = max(_ROUNDING, 4 * float(np.finfo(images.dtype).eps))
    given = given if in_bytes is None else "signed"
    taken = given or ("unit" if low >= -rounding else "signed")
    least = 0 if taken == "unit" else -1
    fits, note = min(low - least, 1 - high) >= -rounding, f"pixels in [{least}, 1]"
    if in_bytes is not None:
        if not np.array_equal(to_bytes(images), in_bytes):
            raise FieldError("data", f"expected arr_0 to hold the samples as bytes in {path}")
        note = note if fits else f"samples beyond [-1, 1], clipped as in arr_0: {got}"
    elif not fits:
        if given is None:
            raise FieldError("data", f"expected pixels in [0, 1] or [-1, 1], {got}")
        expected = f"expected pixels in [{least}, 1], as "
        raise FieldError("data", expected, Field("range", given), f" says, {got}")
    elif given is None and taken == "unit":
        note += ', since none is below 0; if they are in [-1, 1], the range is "signed"'
    images = np.clip(images, least, 1)
    return (images if least else images * 2 - 1).astype(np.float32), taken, note
