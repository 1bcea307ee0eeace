"""Images in NumPy's files, of which a large .npy is mapped, and in Hugging Face's tables."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import Field, FieldError, described
from jax_ddpm.data.dataset import Dataset, Labelling, Preparation, numbered, to_bytes
from jax_ddpm.data.files import part_of, reason, rows, stamp

HUB, PARQUET = "hf://", ".parquet"
_LABELS = ("label", "labels", "fine_label")
_IN_MEMORY = 2**28
"""Bytes. A .npy up to this size is read whole; a larger one of uint8 stays on the disk, and must
not change while it is in use."""
_ROUNDING = 1e-6
"""How far a pixel may leave its range: what was scaled in float32 comes back off by 1e-7."""


def read_arrays(path: Path, preparation: Preparation) -> Dataset:
    """Images [image, height, width(, channel)], and labels [image] or [image, 1]; of several parts
    that for training. Raises `FieldError` naming what cannot be read or has another form."""
    try:
        arrays, notes = _load(path)
        # Of `save_samples`: the samples as bytes, too.
        ours = {"samples", "arr_0"} <= {*arrays}
        ours = ours and arrays["samples"].shape == arrays["arr_0"].shape
        if ours and not np.array_equal(to_bytes(arrays["samples"]), arrays.pop("arr_0")):
            raise ValueError("expected arr_0 to hold the samples as bytes")
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        raise FieldError("data", f"cannot read {path}: {reason(error)}") from None
    called = arrays.pop("class_names", None)
    pictures = [array for array in arrays.values() if array.ndim in (3, 4)]
    columns = [array for array in arrays.values() if array.ndim == 1 or array.shape[1:] == (1,)]
    unknown = len(columns) > 1 or len(arrays) > len(pictures + columns)
    labelled = preparation.labels == "folders"
    if len(pictures) != 1 or (labelled and unknown):
        got = ", ".join(f"{name} {described(each)}" for name, each in arrays.items())
        expected = "one array of images [image, height, width(, channel)] and at most one of labels"
        raise _unexpected(f"{expected} [image]", path, got)
    (images,) = pictures
    count, height, width, channels = images.shape if images.ndim == 4 else (*images.shape, 1)
    is_one = images.ndim == 3 and (count == 3 or (width <= 4 and height != width))
    if is_one or images.size == 0 or channels > 4:
        expected = "images of 1 to 4 channels, which are last (of one picture: add an axis),"
        raise _unexpected(expected, path, list(images.shape))
    images, labels, names, taken = images.reshape(count, height, width, channels), None, None, None
    if labelled and columns:
        labels = columns[0].reshape(-1)
        if len(labels) != count or not np.issubdtype(labels.dtype, np.integer):
            raise _unexpected(f"{count} integer labels", path, described(labels))
        called = None if called is None else called.astype(str).reshape(-1).tolist()
        labels, names, said = read_labels(labels, path, called)
        notes += said
    if images.dtype != np.uint8:
        images = np.clip(images, -1, 1) if ours else np.asarray(images)  # as arr_0 is
        images, taken, note = _to_signed(images, path, "signed" if ours else preparation.range)
        notes += [note]
    elif images[:1000].max() <= 1 and images.max() <= 1:  # the first tell: masks are so anywhere
        notes += ["no pixel is above 1 of 255: masks of 0 and 1 have to be times 255"]
    how = Preparation(range=taken)
    return Dataset(images, labels, notes=(*notes,), class_names=names, preparation=how)


def read_parquet(data: str, *, labelled: bool = True) -> Dataset:
    """The training split of a name on the hub, of a .parquet, or of all those in a folder."""
    import datasets  # pyright: ignore[reportMissingImports]

    name, where = "parquet", {"data_dir" if os.path.isdir(data) else "data_files": data}
    if data.startswith(HUB):
        name, where = data.removeprefix(HUB), {}
    try:
        table = datasets.load_dataset(name, split="train", **where)
    except Exception as error:  # of pyarrow, of the network, or of `datasets` itself
        cause: Any = error.__cause__ or error
        raise FieldError("data", f"cannot read {data}: {reason(cause)}") from None
    features: dict[str, Any] = dict(table.features)
    dtypes = {name: str(getattr(kind, "dtype", kind)) for name, kind in features.items()}
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images += [
        name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind
    ]
    if len(images) != 1:
        raise _unexpected("one column of images", data, dtypes)
    labels, class_names, notes = None, None, ()
    # Of several columns of classes the one with the commonest name.
    classes = [name for name in _LABELS if "int" in dtypes.get(name, "")]
    classes += [name for name, kind in features.items() if isinstance(kind, datasets.ClassLabel)]
    if labelled and classes:
        column, cells = classes[0], table[classes[0]][:]
        if None in cells:
            raise FieldError("data", f"row {cells.index(None)} in {data} has no {column!r}")
        known = getattr(features[column], "names", None)
        labels, class_names, said = read_labels(np.asarray(cells, np.int64), data, known)
        notes = (f"classes by the column {column!r}", *said)
    if isinstance(features[images[0]], datasets.Image):
        table = table.cast_column(images[0], datasets.Image(decode=False))

    def read(index: int) -> bytes:
        cell = table[index][images[0]] or {}
        if cell.get("bytes") is None and not cell.get("path"):
            raise ValueError("there is no image")
        return Path(cell["path"]).read_bytes() if cell.get("bytes") is None else cell["bytes"]

    # Rows that only name a file say nothing of it.
    chunks = table.data.column(images[0]).chunks
    whole = all(chunk.field("bytes").null_count == 0 for chunk in chunks)
    here = " ".join(stamp(Path(each["filename"])) for each in table.cache_files) if whole else ""
    files = rows(Path(data), len(table), read, here)
    return Dataset(files, labels, notes=notes, class_names=class_names)


def read_labels(
    labels: np.ndarray, where: object, called: Sequence[str] | None = None
) -> Labelling:
    """Numbers name the classes that have no names, if some below the largest are missing."""
    high = labels.max() if called is None else len(called) - 1
    if not 0 <= labels.min() <= labels.max() <= high:
        named = "" if called is None else f" ({len(called)} class_names)"
        got = f"{labels.min()} to {labels.max()}"
        raise _unexpected(f"labels from 0 to {high}{named}", where, got)
    if called is None and high >= len(np.unique(labels)):
        return numbered(list(map(str, labels.tolist())), "label")
    return labels.astype(np.int32), None if called is None else tuple(called), ()


def _unexpected(expected: str, where: object, got: object) -> FieldError:
    return FieldError("data", f"expected {expected} in {where}, got {got}")


def _load(path: Path) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays by their names, and which were left out, in a line."""
    if path.suffix.lower() == ".npy" and path.stat().st_size > _IN_MEMORY:
        mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        # In Fortran's order each pixel of an image is on another page.
        return {"images": mapped if mapped.flags.c_contiguous else np.array(mapped)}, []
    with path.open("rb") as file:  # NumPy leaves a damaged one open
        loaded: Any = np.load(file, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return {"images": loaded}, []
        parts = {name: part_of(name) for name in loaded.files}
        rest = [name for name in parts if parts[name] not in (None, "train")]
        if "train" not in parts.values() or not rest:
            return dict(loaded), []
        kept = {name: loaded[name] for name in parts if name not in rest}
        return kept, [f"other parts of the data, left out: {', '.join(rest)}"]


def _to_signed(images: np.ndarray, path: Path, given: Any) -> tuple[np.ndarray, Any, str]:
    """Float images in [-1, 1], the range that they were taken for, and what to say of it."""
    if not np.issubdtype(images.dtype, np.floating):
        raise _unexpected("uint8 or float images", path, images.dtype)
    low, high = float(images.min()), float(images.max())  # NaN if any is
    rounding = max(_ROUNDING, 4 * float(np.finfo(images.dtype).eps))
    taken = given or ("unit" if low >= -rounding else "signed")
    least = 0 if taken == "unit" else -1
    if not (least - rounding <= low and high <= 1 + rounding):
        expected = f"[{least}, 1]" if given else "[0, 1] or [-1, 1]"
        says = (", as ", Field("range", given), " says") if given else ()
        got = f" in {path}, got [{low:.9g}, {high:.9g}]"
        raise FieldError("data", f"expected pixels in {expected}", *says, got)
    note = f"pixels in [{least}, 1]"
    if given is None and taken == "unit":
        note += ', since none is below 0; if they are in [-1, 1], the range is "signed"'
    images = np.clip(images, least, 1)
    return (images if least else images * 2 - 1).astype(np.float32), taken, note
