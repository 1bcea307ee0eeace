"""Samples that are measured: drawn, kept in a folder so that a long draw can resume, or read.

samples/
  recipe.json       what they were drawn from, and how
  00000000.npy      uint8 [image, height, width, channel], the first of them
  00000256.npy      …
"""

import io
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Preparation, load_dataset, to_bytes
from jax_ddpm.io.files import make_folder, read_json, replacing, write_json
from jax_ddpm.runs.model import PathLike
from jax_ddpm.training.hosts import broadcast, run_on_writer

_RECIPE = "recipe.json"
_BATCH = 256


class Samples(NamedTuple):
    """Images that somebody drew."""

    num: int
    image_shape: tuple[int, int, int]
    labels: np.ndarray | None
    """The classes that were asked for, if the file says."""
    class_names: tuple[str, ...] | None
    """What each class is called, if that is known."""
    recipe: dict[str, Any]
    """How they were drawn, as far as the folder says."""
    batches: Callable[[], Iterator[np.ndarray]]
    """uint8, from the first on."""


def open_samples(path: PathLike, range: Any = None) -> Samples:
    """Samples from a folder of `resumed`, or from whatever `load_dataset` reads, with this `range`.

    Raises `FieldError` naming what cannot be read.
    """
    path = Path(os.path.expanduser(path))
    try:
        if (path / _RECIPE).is_file():
            return _of_folder(path)
        data = load_dataset(path, Preparation(range=range))
    except FieldError as error:
        raise FieldError("samples", *error.problem) from None
    except ValueError as error:
        raise FieldError("samples", str(error)) from None

    def batches() -> Iterator[np.ndarray]:
        for first in np.arange(0, len(data.images), _BATCH):
            yield to_bytes(data.images[first : first + _BATCH])

    recipe = {"read as": "; ".join(data.notes)} if data.notes else {}
    shape, labels, names = data.image_shape, data.labels, data.class_names
    return Samples(len(data.images), shape, labels, names, recipe, batches)


def _of_folder(path: Path) -> Samples:
    files, recipe = _files(path), read_json(path / _RECIPE)
    if not files:
        raise FieldError("samples", f"expected samples in {path}, got none yet")
    height, width, channels = _load(files[0]).shape[1:]
    num, turn, names = _count(files), recipe.pop("labels", ()), recipe.pop("class_names", None)
    labels = np.resize(np.asarray(turn, np.int32), num) if turn else None
    return Samples(num, (height, width, channels), labels, names, recipe, lambda: map(_load, files))


def open_kept(folder: PathLike, recipe: dict[str, Any]) -> list[Path]:
    """The files of samples that a folder of this recipe holds, in the process that writes; a new
    folder gets the recipe.

    Raises `FieldError` if the folder holds something else, or samples of another recipe, and
    `OSError`.
    """
    # A sample is the same however many are drawn.
    recipe = {name: value for name, value in recipe.items() if name != "num"}
    found: list[Path] = []

    def look() -> None:
        try:
            found.extend(_found(Path(folder), json.loads(json.dumps(recipe))))
        except FieldError:
            raise
        except ValueError as error:
            raise FieldError("folder", f"{error}; choose another folder") from None

    run_on_writer(look)
    return found


def kept_samples(folder: PathLike) -> int:
    """How many samples are in a folder of `resumed`; 0 where there is none, or one is damaged."""
    try:
        return _count(_files(Path(folder))) if (Path(folder) / _RECIPE).is_file() else 0
    except ValueError:  # `open_kept` says so
        return 0


def resumed(
    folder: PathLike,
    found: Sequence[Path],
    total: int,
    draw: Callable[..., Iterator[np.ndarray]],
) -> Iterator[np.ndarray]:
    """The first `total` samples: those that `open_kept` found, then those of
    `draw(first_sample=…)`,
    each batch written before it is given. Raises `OSError`."""
    done = 0
    for number in range(broadcast(len(found))):
        if done >= total:
            return
        read = run_on_writer(lambda number=number: found[number].read_bytes())
        batch = np.load(io.BytesIO(broadcast(read or b"")))
        yield batch[: total - done]
        done += len(batch)
    for images in draw(first_sample=done) if done < total else ():
        batch, path = to_bytes(images), Path(folder) / f"{done:08d}.npy"
        run_on_writer(lambda batch=batch, path=path: _save(path, batch))
        done += len(batch)
        yield batch


def _found(folder: Path, recipe: dict[str, Any]) -> list[Path]:
    path = folder / _RECIPE
    if not path.exists():
        if folder.is_file() or (folder.exists() and any(folder.iterdir())):
            raise FieldError("folder", f"expected a new or empty folder, got {folder}")
        make_folder(folder)
        write_json(path, recipe)
        return []
    before = read_json(path)
    differing = {name for name in {*before, *recipe} if before.get(name) != recipe.get(name)}
    if differing:
        name = "steps" if "steps" in differing else min(differing)
        what = f"{name} was {before.get(name)}, is {recipe.get(name)}"
        raise FieldError("folder", f"{folder} holds other samples: {what}; choose another folder")
    return _files(folder)


def _files(folder: Path) -> list[Path]:
    """Those that follow one another from the first sample on. Raises `ValueError` naming one that
    is damaged."""
    files, expected = [], 0
    for path in sorted(folder.glob("*.npy")):
        # Batches of another size may have left one that begins within the one before.
        if path.stem == f"{expected:08d}":
            files.append(path)
            expected += len(_load(path))
    return files


def _count(files: Sequence[Path]) -> int:
    return int(files[-1].stem) + len(_load(files[-1])) if files else 0


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}: without it, it is drawn again") from None


def _save(path: Path, batch: np.ndarray) -> None:
    with replacing(path) as file:
        np.save(file, batch)
