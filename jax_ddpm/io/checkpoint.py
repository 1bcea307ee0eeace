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

from jax_ddpm.io.arrays import check_weights, flatten, from_bytes, to_bytes
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

    Replaces an older checkpoint of that step, which is `.00000STEP.old` while it is renamed, and
    returns the path. Raises `ValueError` if an array holds NaN or infinity, and `OSError`; what was
    there before is still there then.
    """
    path = Path(folder) / f"{step:08d}"
    files = {}
    for name, tree in arrays.items():
        flat = {key: np.asarray(leaf) for key, leaf in flatten(tree).items()}
        check_weights(flat, name)
        files[name + _ARRAYS] = to_bytes(flat)
    files[_STATE] = (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
    described = {name: _described(data) for name, data in files.items()}
    files[_MANIFEST] = _sealed({**_KIND, "step": step, "files": described})
    with new_folder(path) as new:
        for name, data in files.items():
            write_file(new / name, data)
        replaced = path.exists() and set_aside(path, "old")
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read and verify a checkpoint.

    Raises `Damaged`, naming the file, if one is missing or differs from what was written, and
    `ValueError` if one cannot be read or another version wrote it.
    """
    path = Path(path)
    if not (path / _MANIFEST).exists() and (several := list_checkpoints(path)):
        names = ", ".join(each.name for each in several)
        raise ValueError(f"{path}: expected one checkpoint, got a folder of several: {names}")
    data, manifest, intact = _read(path / _MANIFEST), {}, False
    with suppress(ValueError, RecursionError, KeyError, TypeError):
        manifest = json.loads(data)
        del manifest["sha256"]
        intact = data == _sealed(manifest)
    if not intact:
        raise Damaged(f"{path / _MANIFEST}: damaged: its SHA-256 is not that of what it says")
    if (got := {name: manifest.get(name) for name in _KIND}) != _KIND:
        raise ValueError(
            f"{path / _MANIFEST}: expected {_KIND}, got {got}: another version of jax_ddpm wrote it"
        )
    contents = {}
    for name, described in manifest["files"].items():
        contents[name] = _read(path / name)
        if _described(contents[name]) != described:
            raise Damaged(f"{path / name}: damaged: its size or SHA-256 is not the manifest's")
    state = json.loads(contents.pop(_STATE))
    arrays = {name.removesuffix(_ARRAYS): from_bytes(data) for name, data in contents.items()}
    return Checkpoint(manifest["step"], arrays, state)


def restore(template: Any, flat: Mapping[str, np.ndarray]) -> Any:
    """Arrays by path as a tree like `template`, whose leaves have a shape and a dtype.

    Raises `ValueError` if an array is missing, unknown, or of another shape or dtype.
    """
    expected = flatten(template)
    for name in sorted(expected.keys() | flat.keys()):
        if name not in flat:
            raise ValueError(f"expected an array {name}, got none")
        if name not in expected:
            raise ValueError(f"expected only the model's arrays, got {name}")
        want, got = (f"{x.dtype}{list(x.shape)}" for x in (expected[name], flat[name]))
        if got != want:
            raise ValueError(f"expected {name} of {want}, got {got}")
    return jax.tree.unflatten(jax.tree.structure(template), [flat[name] for name in expected])


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, damaged ones among them, oldest first."""
    folders = (path for path in Path(folder).glob("*") if path.is_dir())
    return sorted((path for path in folders if path.name.isdecimal()), key=lambda x: int(x.name))


def prune_checkpoints(
    folder: str | os.PathLike[str],
    *,
    keep: int,
    keep_every: int | None = None,
    also: Collection[int | None] = (),
) -> None:
    """Remove leftovers, and all checkpoints but the last `keep`, those at multiples of
    `keep_every` steps, and those at the steps in `also`. To be called after a save."""
    for path in list_checkpoints(folder)[: -max(keep, 1)]:
        step = int(path.name)
        if step not in also and (keep_every is None or step % keep_every):
            # Renamed first: a half-removed folder must not look like a checkpoint.
            shutil.rmtree(set_aside(path, "gone"), ignore_errors=True)
    for path in Path(folder).glob(".*"):
        if path.suffix == ".old" and not (original := path.with_name(path.stem[1:])).exists():
            os.rename(path, original)  # its replacement was never finished
        elif path.suffix in LEFTOVERS:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a checkpoint `.00000STEP.REASON`, so that it no longer counts as one."""
    aside = path.with_name(f".{path.name}.{reason}")
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


def _described(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _sealed(manifest: dict[str, Any]) -> bytes:
    """JSON that ends in its own SHA-256."""
    digest = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    return (json.dumps({**manifest, "sha256": digest}, indent=1) + "\n").encode()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: damaged: expected a file, got none") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot read it: {error.strerror}") from None
