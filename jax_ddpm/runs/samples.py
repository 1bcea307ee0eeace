"""Samples that are measured: drawn, kept in a folder so that a long draw can resume, or read.

samples/
  recipe.json       what they were drawn from, and how
  00000000.npy      uint8 [image, height, width, channel], the first of them
  00000256.npy      …
"""

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._checks import FieldError
from jax_ddpm.data import load_dataset, to_bytes
from jax_ddpm.io.files import make_folder, replacing
from jax_ddpm.io.json import read_json, write_json
from jax_ddpm.runs.run import PathLike
from jax_ddpm.training.hosts import everywhere, from_writer, is_writer, on_writer, together

__all__ = ["Samples", "kept_samples", "open_samples", "resumed"]

_RECIPE = "recipe.json"
_BATCH = 256


class Samples(NamedTuple):
    """Images that somebody drew."""

    num: int
    image_shape: tuple[int, int, int]
    labels: np.ndarray | None
    """The classes that were asked for, if the file says."""
    recipe: dict[str, Any]
    """How they were drawn, as far as the folder says."""
    batches: Callable[[], Iterator[np.ndarray]]
    """uint8, from the first on."""


def open_samples(path: PathLike) -> Samples:
    """Samples from a folder of `resumed`, or from whatever `load_dataset` reads.

    Raises `FieldError` naming what cannot be read.
    """
    path = Path(path)
    if (path / _RECIPE).is_file():
        files = _files(path)
        if not files:
            raise FieldError("samples", f"{path} has no samples yet")
        first = _load(files[0])
        count = kept_samples(path)
        height, width, channels = first.shape[1:]
        recipe = read_json(path / _RECIPE)
        classes = recipe.pop("num_classes", None)
        labels = None if classes is None else np.arange(count, dtype=np.int32) % classes
        shape = (height, width, channels)
        return Samples(count, shape, labels, recipe, lambda: map(_load, files))
    try:
        data = load_dataset(path)
    except FieldError as error:
        raise FieldError("samples", *error.problem) from None

    def batches() -> Iterator[np.ndarray]:
        for first in range(0, len(data.images), _BATCH):
            yield to_bytes(data.images[first : first + _BATCH])

    return Samples(len(data.images), data.image_shape, data.labels, {}, batches)


def kept_samples(folder: PathLike) -> int:
    """How many samples are in a folder of `resumed`; 0 where there is none."""
    files = _files(Path(folder)) if (Path(folder) / _RECIPE).is_file() else []
    return int(files[-1].stem) + len(_load(files[-1])) if files else 0


def resumed(
    folder: PathLike,
    recipe: dict[str, Any],
    total: int,
    draw: Callable[[int], Iterator[np.ndarray]],
) -> Iterator[np.ndarray]:
    """The first `total` samples: those that are in `folder`, then those of `draw(first_sample)`,
    each batch written before it is given.

    Raises `FieldError` if the folder holds something else, or samples of another recipe, and
    `OSError`.
    """
    folder = Path(folder)
    # A sample is the same however many are drawn.
    recipe = {name: value for name, value in recipe.items() if name != "num"}
    recipe = json.loads(json.dumps(recipe))
    found: list[Path] = []
    together(lambda: found.extend(_found(folder, recipe)) if is_writer() else None)
    done = 0
    for number in range(everywhere(len(found))):
        batch = np.load(io.BytesIO(from_writer(found[number].read_bytes() if found else b"")))
        yield batch[: max(total - done, 0)]
        done += len(batch)
    for images in draw(done):
        batch, path = to_bytes(images), folder / f"{done:08d}.npy"
        on_writer(lambda batch=batch, path=path: _save(path, batch))
        done += len(batch)
        yield batch


def _found(folder: Path, recipe: dict[str, Any]) -> list[Path]:
    path = folder / _RECIPE
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise FieldError("folder", f"expected a new or empty folder, got {folder}")
        make_folder(folder)
        write_json(path, recipe)
        return []
    before = read_json(path)
    differing = {name for name in {*before, *recipe} if before.get(name) != recipe.get(name)}
    if differing:
        name = min(differing)
        what = f"{name} was {before.get(name)}, is {recipe.get(name)}"
        raise FieldError("folder", f"{folder} holds other samples: {what}; choose another folder")
    return _files(folder)


def _files(folder: Path) -> list[Path]:
    """Those without a gap before them."""
    files, expected = [], 0
    for path in sorted(folder.glob("*.npy")):
        if path.stem != f"{expected:08d}":
            break
        files.append(path)
        expected += len(_load(path))
    return files


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise FieldError("samples", f"cannot read {path}: {error}") from None


def _save(path: Path, batch: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, batch)
