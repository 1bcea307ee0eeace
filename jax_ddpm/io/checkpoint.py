"""Checkpoints: written whole or not at all, and verified to the last byte when read.

    checkpoints/00001500/
      NAME.safetensors    the arrays of one tree, by path
      state.json          everything that is not an array
      manifest.json       size and SHA-256 of each file, and a SHA-256 of itself

A checkpoint is written under a temporary name that begins with a dot, flushed to the disk, and
renamed. No pickle, and nothing that depends on the version of JAX.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ddpm.io.arrays import flatten, from_bytes, to_bytes
from jax_ddpm.io.files import new_folder, write_file

LEFTOVERS = (".tmp", ".old", ".gone")
"""Suffixes of the hidden folders that a stopped process leaves behind."""
_KIND = {"kind": "jax_ddpm checkpoint", "format": 1}  # plus one when older versions cannot read it
_MANIFEST, _STATE, _ARRAYS = "manifest.json", "state.json", ".safetensors"


class Damaged(ValueError):
    """A file of a checkpoint is missing or is not what was written."""


class Checkpoint(NamedTuple):
    """What was saved after `step` steps: trees by name, each flat by path, and the rest."""

    step: int
    arrays: dict[str, dict[str, np.ndarray]]
    state: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, arrays: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Write trees of arrays by name, and a `state` that JSON can hold, to `folder/00000STEP`.

    Replaces an older checkpoint of that step, and returns the path. Raises `ValueError` if an array
    holds NaN or infinity, and `OSError`; what was there before is still there then.
    """
    path = Path(folder) / f"{step:08d}"
    files = {name + _ARRAYS: to_bytes(flatten(tree), name) for name, tree in arrays.items()}
    files[_STATE] = (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
    described = {name: _described(data) for name, data in files.items()}
    files[_MANIFEST] = _sealed({**_KIND, "step": step, "files": described})
    aside = path.with_name(f".{path.name}.old")
    try:
        with new_folder(path) as new:
            for name, data in files.items():
                write_file(new / name, data)
            if path.exists():
                set_aside(path, "old")
    except OSError:
        if aside.exists() and not path.exists():
            aside.rename(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint. Raises `Damaged`, naming the file, if one is missing or differs
    from what was written, and `ValueError` if another version wrote it."""
    path = Path(path)
    try:
        contents = {each.name: each.read_bytes() for each in path.iterdir() if each.is_file()}
    except OSError as error:
        raise ValueError(f"{error.filename or path}: cannot read it: {error.strerror}") from None
    data, manifest, intact = contents.get(_MANIFEST, b""), {}, False
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        manifest = json.loads(data)
        del manifest["sha256"]
        intact = data == _sealed(manifest)
    if not intact:
        raise Damaged(f"{path / _MANIFEST}: damaged or missing: its SHA-256 is not its own")
    if not _KIND.items() <= manifest.items():
        raise ValueError(f"{path / _MANIFEST}: another version of jax_ddpm wrote it")
    for name, described in {_STATE: None, **manifest["files"]}.items():
        if _described(contents.get(name, b"")) != described:
            raise Damaged(f"{path / name}: damaged or missing: its SHA-256 is not the manifest's")
    names = manifest["files"].keys() - {_STATE}
    arrays = {name.removesuffix(_ARRAYS): from_bytes(contents[name]) for name in sorted(names)}
    return Checkpoint(manifest["step"], arrays, json.loads(contents[_STATE]))


def restore(template: Any, flat: Mapping[str, np.ndarray]) -> Any:
    """Arrays by path as a tree like `template`, whose leaves have a shape and a dtype.

    Raises `ValueError` if an array is missing, unknown, or of another shape or dtype.
    """
    expected = flatten(template)
    for name in sorted(expected.keys() | flat.keys()):
        pair = (expected.get(name), flat.get(name))
        want, got = ("no array" if x is None else f"{x.dtype}{list(x.shape)}" for x in pair)
        if got != want:
            raise ValueError(f"{name}: expected {want}, got {got}")
    return jax.tree.unflatten(jax.tree.structure(template), [flat[name] for name in expected])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, damaged ones among them, oldest first."""
    paths = (path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir())
    return sorted(paths, key=lambda path: int(path.name))


def prune_checkpoints(
    folder: Path, *, keep: int, keep_every: int | None = None, also: Collection[int | None] = ()
) -> None:
    """Remove leftovers, and all checkpoints but the last `keep`, those at multiples of
    `keep_every` steps, and those at the steps in `also`. To be called after a save."""
    for path in list_checkpoints(folder)[: -max(keep, 1)]:
        step = int(path.name)
        if step not in also and (keep_every is None or step % keep_every):
            # Renamed first: a half-removed folder must not look like a checkpoint.
            shutil.rmtree(set_aside(path, "gone"), ignore_errors=True)
    for path in folder.glob(".*"):
        if path.suffix == ".old" and not (original := path.with_name(path.stem[1:])).exists():
            path.rename(original)  # its replacement was never finished
        elif path.suffix in LEFTOVERS:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a checkpoint `.00000STEP.REASON`, so that it no longer counts as one."""
    aside = path.with_name(f".{path.name}.{reason}")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def _described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sealed(manifest: dict[str, Any]) -> bytes:
    """JSON that ends in its own SHA-256."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1) + "\n").encode()
