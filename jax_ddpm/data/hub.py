"""Sets of images as Hugging Face keeps them: Parquet files, or a name on its hub, by `datasets`."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data.arrays import read_labels
from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.files import Rows, Unreadable, part_of, stamp

HUB, PARQUET = "hf://", ".parquet"
_LABELS = ("label", "labels", "fine_label")


def read_parquet(data: str, *, labelled: bool = True) -> Dataset:
    """The training split of a name on the hub, of a .parquet, or of all those in a folder."""
    import datasets  # pyright: ignore[reportMissingImports]

    others: list[str] = []
    try:
        with _quiet(datasets):
            if data.startswith(HUB):
                table = datasets.load_dataset(data.removeprefix(HUB), split="train")
            else:
                chosen, others = _training_files(Path(data))
                table = datasets.load_dataset("parquet", data_files=chosen, split="train")
    except Exception as error:  # of pyarrow, of the network, or of `datasets` itself
        lines = str(error.__cause__ or error).splitlines() or [type(error).__name__]
        raise FieldError("data", f"cannot read {data}: {lines[0]}") from None
    features: dict[str, Any] = dict(table.features)
    kinds = {name: type(kind).__name__ for name, kind in features.items()}
    structs = {name for name, kind in features.items() if isinstance(kind, dict)}
    in_bytes = {name for name in structs if "bytes" in features[name]}
    pictures = [name for name, kind in kinds.items() if kind == "Image" or name in in_bytes]
    if len(pictures) != 1:
        got = ", ".join(f"{name} {getattr(features[name], 'dtype', kinds[name])}" for name in kinds)
        raise FieldError("data", f"expected one column of images in {data}, got {got}")
    notes = [f"files of other splits, left out: {', '.join(others)}"] if others else []
    labels, names = None, None
    # Of several columns of classes the one with the commonest name.
    counted = [name for name in _LABELS if "int" in str(getattr(features.get(name), "dtype", ""))]
    classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    named = [name for name in _LABELS if name in (*classes, *counted)]
    if labelled and (column := next(iter((*named, *classes)), None)):
        cells = table[column][:]
        if None in cells:
            raise FieldError("data", f"row {cells.index(None)} in {data} has no {column!r}")
        labels, names, said = read_labels(np.asarray(cells, np.int64), data)
        if (known := getattr(features[column], "names", None)) is not None:
            labels, names, said = np.asarray(cells, np.int32), tuple(known), ()
        notes += [f"classes by the column {column!r}", *said]
    if kinds[pictures[0]] == "Image":
        table = table.cast_column(pictures[0], datasets.Image(decode=False))

    def read(index: int) -> bytes:
        cell = table[index][pictures[0]] or {}
        if cell.get("bytes") is not None:
            return cell["bytes"]
        if not (path := cell.get("path")):
            raise Unreadable(f"row {index}", "there is no image")
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise Unreadable(f"row {index}", f"{path}: {error.strerror}") from None

    # Rows that only name a file say nothing of it.
    column = table.data.column(pictures[0])
    whole = all(chunk.field("bytes").null_count == 0 for chunk in column.chunks)
    here = " ".join(stamp(Path(each["filename"])) for each in table.cache_files) if whole else ""
    rows = Rows("row", len(table), read, here)
    return Dataset(rows, labels, notes=tuple(notes), class_names=names)


@contextmanager
def _quiet(datasets: Any) -> Iterator[None]:
    """Without its progress bars and log, which a single line of ours replaces."""
    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _training_files(path: Path) -> tuple[list[str], list[str]]:
    """The .parquet files that say "train" in their names or folders (if none does, all), and the
    others."""
    if not path.is_dir():
        return [str(path)], []
    files = [file.relative_to(path) for file in sorted(path.rglob(f"*{PARQUET}"))]
    training = [file for file in files if part_of(str(file)) == "train"]
    others = [str(file) for file in files if file not in training] if training else []
    return [str(path / file) for file in training or files], others
