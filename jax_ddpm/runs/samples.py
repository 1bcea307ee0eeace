"""Samples that are measured: drawn, kept in a folder so that a long draw can resume, or read.

samples/
  recipe.json       what they were drawn from, and how
  00000000.npy      uint8 [image, height, width, channel], the first of them
  00000256.npy      …
"""

import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Preparation, load_dataset, to_bytes
from jax_ddpm.io.files import make_folder, read_json, replace_file, write_json
from jax_ddpm.runs.model import PathLike
from jax_ddpm.training.hosts import broadcast, run_on_writer

_RECIPE = "recipe.json"
_BATCH = 256


class Samples(NamedTuple):
    """Images that somebody drew, or that are drawn as they are read."""

    num: int
    image_shape: tuple[int, int, int]
    labels: np.ndarray | None
    """The classes that were asked for, if they are known."""
    class_names: tuple[str, ...] | None
    recipe: dict[str, Any]
    """How they are drawn, as far as it is known."""
    batches: Callable[[], Iterator[np.ndarray]]
    """uint8, from the first on."""


def open_samples(path: PathLike, range: Any = None) -> Samples:
    """Samples from a folder of `resumed`, or from whatever `load_dataset` reads, with this `range`.
    Raises `FieldError` naming what cannot be read."""
    path = Path(os.path.expanduser(path))
    try:
        if (path / _RECIPE).is_file():
            (files, num), recipe = _kept(path), read_json(path / _RECIPE)
            if not files:
                raise ValueError(f"expected samples in {path}, got none yet")
            turn, names = recipe.pop("labels", ()), recipe.pop("class_names", None)
            labels = np.resize(np.asarray(turn, np.int32), num) if turn else None
            shape = _load(files[0]).shape[1:]
            return Samples(num, shape, labels, names, recipe, partial(map, _load, files))
        data = load_dataset(path, Preparation(range=range))
    except ValueError as error:
        raise FieldError("samples", *getattr(error, "problem", [str(error)])) from None
    recipe = {"read as": "; ".join(data.notes)} if data.notes else {}
    parts = [slice(k, k + _BATCH) for k in np.arange(0, len(data), _BATCH).tolist()]
    batches = partial(map, lambda part: to_bytes(data.images[part]), parts)
    return Samples(len(data), data.image_shape, data.labels, data.class_names, recipe, batches)


def resumed(
    folder: PathLike, recipe: dict[str, Any], total: int, draw: Callable[..., Iterator[np.ndarray]]
) -> Iterator[np.ndarray]:
    """The first `total` samples of this recipe: those in the folder, then those of
    `draw(first_sample=…)`, each batch written before it is given. Raises `FieldError` at once if
    the folder holds something else."""
    folder, recipe = Path(folder), json.loads(json.dumps(recipe))

    def begin() -> list[str]:
        if not (folder / _RECIPE).exists():
            if folder.is_file() or (folder.exists() and any(folder.iterdir())):
                raise FieldError("folder", f"expected a new or empty folder, got {folder}")
            make_folder(folder)
            write_json(folder / _RECIPE, recipe)
        try:
            before, (files, _) = read_json(folder / _RECIPE), _kept(folder)
        except ValueError as error:
            raise FieldError("folder", f"{error}; choose another folder") from None
        for name in [*recipe, *before]:
            if before.get(name) != recipe.get(name):
                what = f"{name} was {before.get(name)}, is {recipe.get(name)}"
                problem = f"{folder} holds other samples: {what}; choose another folder"
                raise FieldError("folder", problem)
        return [path.name for path in files]

    names = broadcast(run_on_writer(begin)) or []

    def batches() -> Iterator[np.ndarray]:
        done = 0
        for name in names:
            if done >= total:
                return
            read = run_on_writer((folder / name).read_bytes)
            batch = np.load(io.BytesIO(broadcast(read or b"")))
            yield batch[: total - done]
            done += len(batch)
        for images in draw(first_sample=done) if done < total else ():
            batch, content = to_bytes(images), io.BytesIO()
            np.save(content, batch)
            path = folder / f"{done:08d}.npy"
            run_on_writer(partial(replace_file, path, content.getvalue()))
            done += len(batch)
            yield batch

    return batches()


def _kept(folder: Path) -> tuple[list[Path], int]:
    """The files that follow one another from the first sample on, and how many samples they hold.
    Raises `ValueError` naming one that is damaged."""
    files, count = [], 0
    for path in sorted(folder.glob("*.npy")):
        # Batches of another size may have left one that begins within the one before.
        if path.stem == f"{count:08d}":
            files.append(path)
            count += len(_load(path))
    return files, count


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r")
    except Exception as error:  # NumPy's, and its tokenizer's of a header
        raise ValueError(f"cannot read {path}: {error}: without it, it is drawn again") from None
