"""Sets of images as Hugging Face keeps them: Parquet files, or a name on its hub, by `datasets`."""

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data.arrays import read_labels
from jax_ddpm.data.dataset import split_of
from jax_ddpm.data.files import Unreadable
from jax_ddpm.data.pictures import EncodedSet
from jax_ddpm.data.preparing import Source

HUB = "hf://"
"""What a name on the hub begins with: hf://OWNER/NAME."""

_LABELS = ("label", "labels", "fine_label")


def is_parquet(names: Collection[str]) -> bool:
    """Whether files of these names are such a set."""
    return any(name.endswith(".parquet") for name in names)


def read_parquet(data: str, *, labelled: bool = True) -> Source:
    """The training split of a name on the hub, of a .parquet, or of all those in a folder.

    Raises `FieldError` where it cannot be read, or has no column of images.
    """
    import datasets  # pyright: ignore[reportMissingImports]

    left_out: list[str] = []
    datasets.disable_progress_bars()
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(logging.CRITICAL)  # the line below says it
    try:
        if data.startswith(HUB):
            table = datasets.load_dataset(data.removeprefix(HUB), split="train")
        else:
            chosen, left_out = _training_files(Path(data))
            table = datasets.load_dataset("parquet", data_files=chosen, split="train")
    except Exception as error:  # of pyarrow, of the network, or of `datasets` itself
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise FieldError("data", f"cannot read {data}: {lines[0]}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
    features: dict[str, Any] = dict(table.features)
    pictures = [name for name, kind in features.items() if _is_picture(kind)]
    if len(pictures) != 1:
        got = ", ".join(f"{name} {_kind(kind)}" for name, kind in features.items())
        raise FieldError("data", f"expected one column of images in {data}, got {got}")
    table, notes, names, labels = _Table(table, pictures[0]), [], None, None
    if left_out:
        notes.append(f"files of other splits, left out: {', '.join(left_out)}")
    if labelled and (classes := _label_column(features)):
        cells = table.rows[classes]
        if None in cells:
            raise FieldError("data", f"row {cells.index(None)} in {data} has no {classes!r}")
        labels, names, said = read_labels(np.asarray(cells, np.int64), data)
        if (known := getattr(features[classes], "names", None)) is not None:
            labels, names, said = np.asarray(cells, np.int32), tuple(known), ()
        notes += [f"classes by the column {classes!r}", *said]
    return Source(table, labels, names, tuple(notes))


def _training_files(path: Path) -> tuple[list[str], list[str]]:
    """The .parquet files that say "train" in their names or folders (if none does, all), and the
    others."""
    if not path.is_dir():
        return [str(path)], []
    files = [file.relative_to(path) for file in sorted(path.rglob("*.parquet"))]
    training = [file for file in files if split_of(str(file)) == "train"]
    others = [str(file) for file in files if file not in training] if training else []
    return [str(path / file) for file in training or files], others


class _Table(EncodedSet):
    """Encoded pictures of one column."""

    def __init__(self, rows: Any, column: str) -> None:
        from datasets import Image  # pyright: ignore[reportMissingImports]

        if isinstance(rows.features[column], Image):
            rows = rows.cast_column(column, Image(decode=False))
        self.rows, self._column = rows, column
        self.names = [f"row {index}" for index in range(len(rows))]

    def read(self, index: int) -> bytes:
        cell = self.rows[int(index)][self._column] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        path = cell.get("path")
        if not path:
            raise Unreadable(self.names[index], "there is no image")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise Unreadable(self.names[index], f"{path}: {error.strerror}") from None


def _is_picture(kind: Any) -> bool:
    return type(kind).__name__ == "Image" or (isinstance(kind, dict) and "bytes" in kind)


def _label_column(features: dict[str, Any]) -> str | None:
    """The column of classes; of several, the one with the commonest name."""
    classes = [name for name, kind in features.items() if type(kind).__name__ == "ClassLabel"]
    whole = [name for name in _LABELS if "int" in str(getattr(features.get(name), "dtype", ""))]
    named = [name for name in _LABELS if name in (*classes, *whole)]
    return next(iter((*named, *classes)), None)


def _kind(kind: Any) -> str:
    return str(getattr(kind, "dtype", None) or type(kind).__name__)
