"""Sets of images as Hugging Face keeps them: Parquet files, or a name on its hub, by `datasets`."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data.arrays import read_labels
from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.files import reason, rows, stamp

HUB, PARQUET = "hf://", ".parquet"
_LABELS = ("label", "labels", "fine_label")


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
    images = [name for name, kind in features.items() if isinstance(kind, datasets.Image)]
    images += [
        name for name, kind in features.items() if isinstance(kind, dict) and "bytes" in kind
    ]
    if len(images) != 1:
        got = ", ".join(f"{name} {getattr(kind, 'dtype', kind)}" for name, kind in features.items())
        raise FieldError("data", f"expected one column of images in {data}, got {got}")
    labels, class_names, notes = None, None, ()
    # Of several columns of classes the one with the commonest name.
    classes = [name for name in _LABELS if "int" in str(getattr(features.get(name), "dtype", ""))]
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
