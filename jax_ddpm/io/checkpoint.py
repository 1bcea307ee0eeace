"""Checkpoints: written whole or not at all, and every byte accounted for when read.

    checkpoints/00001500/
      NAME.safetensors    the arrays of one tree, by path
      state.json          everything that is not an array
      manifest.json       size and SHA-256 of each of them, and of itself

A checkpoint is written under a temporary name, flushed to the disk, and renamed. Whenever the
process or the machine stops, the older ones are as they were, and what is half written begins
with a dot. Formats of arrays do not notice a flipped bit; `load_checkpoint` does, and names the
file. Nothing in here is a pickle, or depends on the version of JAX.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ddpm.io.arrays import check_weights, flatten, from_bytes, to_bytes
from jax_ddpm.io.files import flush_folder, make_folder, write_file

__all__ = [
    "FORMAT",
    "LEFTOVERS",
    "Checkpoint",
    "Damaged",
    "list_checkpoints",
    "load_checkpoint",
    "prune_checkpoints",
    "restore",
    "save_checkpoint",
    "set_aside",
]

FORMAT = 1
"""Raised by one whenever an older version could not read what this one writes."""
LEFTOVERS = (".tmp", ".old", ".gone")
"""How the names of folders end that a stopped process left; they begin with a dot."""
_KIND = "jax_ddpm checkpoint"
_MANIFEST, _STATE, _ARRAYS = "manifest.json", "state.json", ".safetensors"


class Damaged(ValueError):
    """A file is not what was written. (What another version wrote, or nothing can read, is
    another `ValueError`.)"""


class Checkpoint(NamedTuple):
    """What was saved after `step` steps: trees of arrays, each flat by path, and the rest."""

    step: int
    arrays: dict[str, dict[str, np.ndarray]]
    state: dict[str, Any]


def save_checkpoint(
    folder: str | os.PathLike[str], step: int, arrays: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Write `folder/00000STEP`, in place of an older one of this step, and return its path.

    Args:
      folder: of all checkpoints; made if need be.
      step: how many steps were taken.
      arrays: trees by name; a file for each.
      state: what JSON can hold.

    Raises:
      ValueError: an array holds NaN or infinity: such a state is never kept.
      OSError: it cannot be written; whatever was there is untouched.
    """
    folder = Path(folder)
    path, temporary = folder / f"{step:08d}", folder / f".{step:08d}.tmp"
    files = {}
    for name, tree in arrays.items():
        flat = {key: np.asarray(leaf) for key, leaf in flatten(tree).items()}
        check_weights(flat, name)
        files[name + _ARRAYS] = to_bytes(flat)
    files[_STATE] = (json.dumps(state, indent=1, allow_nan=False) + "\n").encode()
    files[_MANIFEST] = _manifest(step, files)
    aside = _beside(path, "old")
    try:
        make_folder(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        for name, data in files.items():
            write_file(temporary / name, data)
        flush_folder(temporary)
        if path.exists():
            set_aside(path, "old")
        os.rename(temporary, path)
        flush_folder(folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if aside.exists() and not path.exists():
            os.rename(aside, path)
        raise OSError(error.errno, error.strerror, str(path)) from None
    shutil.rmtree(aside, ignore_errors=True)
    return path


def load_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Read all of a checkpoint.

    Raises `ValueError` naming the file: `Damaged` where it is missing or is not to the last bit
    what was written, another where it cannot be read or is of another version.
    """
    path = Path(path)
    if not (path / _MANIFEST).exists() and (several := list_checkpoints(path)):
        names = ", ".join(each.name for each in several)
        raise ValueError(f"{path}: expected one checkpoint, got a folder of several: {names}")
    step, files = _read_manifest(path / _MANIFEST)
    contents = {}
    for name, (size, digest) in files.items():
        data = _read(path / name)
        if len(data) != size:
            raise Damaged(f"{path / name}: damaged: expected {size} bytes, got {len(data)}")
        if hashlib.sha256(data).hexdigest() != digest:
            raise Damaged(f"{path / name}: damaged: its SHA-256 is not the manifest's")
        contents[name] = data
    state = json.loads(contents.pop(_STATE))
    arrays = {name.removesuffix(_ARRAYS): from_bytes(data) for name, data in contents.items()}
    return Checkpoint(step, arrays, state)


def restore(template: Any, flat: Mapping[str, np.ndarray]) -> Any:
    """The tree of `template`'s structure whose leaves are in `flat`.

    Raises `ValueError` if a leaf is missing, is one too many, or has another shape or dtype.
    """
    expected = flatten(template)
    for name in sorted(expected.keys() | flat.keys()):
        if name not in flat:
            raise ValueError(f"expected an array {name}, got none")
        if name not in expected:
            raise ValueError(f"expected only the model's arrays, got {name}")
        want, got = expected[name], flat[name]
        if got.shape != want.shape or got.dtype != want.dtype:
            raise ValueError(
                f"expected {name} of {want.dtype}{list(want.shape)}, "
                f"got {got.dtype}{list(got.shape)}"
            )
    return jax.tree.unflatten(jax.tree.structure(template), [flat[name] for name in expected])


def list_checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """The checkpoints in `folder`, damaged or not, oldest first."""
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return sorted(
        (path for path in folder.iterdir() if path.name.isdecimal() and path.is_dir()),
        key=lambda path: int(path.name),
    )


def prune_checkpoints(
    folder: str | os.PathLike[str],
    *,
    keep: int,
    keep_every: int | None = None,
    also: Collection[int | None] = (),
) -> None:
    """Remove all but the last `keep`, those at multiples of `keep_every` steps, those `also` at
    these steps, and leftovers.

    Call it after a save, so that the last is good.
    """
    for path in list_checkpoints(folder)[: -max(keep, 1)]:
        step = int(path.name)
        if step not in also and (keep_every is None or step % keep_every):
            # Under another name first: half a removal must not look like a checkpoint.
            shutil.rmtree(set_aside(path, "gone"), ignore_errors=True)
    for path in Path(folder).glob(".*"):
        if path.suffix == ".old" and not (original := path.with_name(path.stem[1:])).exists():
            os.rename(path, original)  # its successor never came
        elif path.suffix in LEFTOVERS:
            shutil.rmtree(path, ignore_errors=True)


def set_aside(path: Path, reason: str) -> Path:
    """Rename a checkpoint so that it no longer counts as one; its new name begins with a dot."""
    aside = _beside(path, reason)
    shutil.rmtree(aside, ignore_errors=True)
    os.rename(path, aside)
    return aside


def _beside(path: Path, reason: str) -> Path:
    return path.with_name(f".{path.name}.{reason}")


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    described = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in files.items()
    }
    return _sealed({"kind": _KIND, "format": FORMAT, "step": step, "files": described})


def _sealed(content: Mapping[str, Any]) -> bytes:
    """JSON whose last entry is the SHA-256 of what it says without it."""
    digest = hashlib.sha256(json.dumps(content, indent=1).encode()).hexdigest()
    return (json.dumps({**content, "sha256": digest}, indent=1) + "\n").encode()


def _read_manifest(path: Path) -> tuple[int, dict[str, tuple[int, str]]]:
    """The step, and size and digest of each file."""
    data = _read(path)
    try:
        content = json.loads(data)
        unsealed = {name: value for name, value in content.items() if name != "sha256"}
    except (ValueError, RecursionError, AttributeError):
        raise Damaged(f"{path}: damaged: expected a manifest in JSON") from None
    if data != _sealed(unsealed):
        raise Damaged(f"{path}: damaged: its SHA-256 is not that of what it says")
    if unsealed.get("kind") != _KIND:
        raise ValueError(f"{path}: expected the manifest of a {_KIND}")
    if unsealed.get("format") != FORMAT:
        raise ValueError(
            f"{path}: expected format {FORMAT}, got {unsealed.get('format')}: "
            "another version of jax_ddpm wrote it"
        )
    try:
        files = {name: (each["bytes"], each["sha256"]) for name, each in unsealed["files"].items()}
        known = all(
            Path(name).name == name and name.endswith(_ARRAYS) for name in files if name != _STATE
        )
        if not known or _STATE not in files or type(unsealed["step"]) is not int:
            raise ValueError
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path}: expected a step and files beside it") from None
    return unsealed["step"], files


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise Damaged(f"{path}: damaged: expected a file, got none") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot read it: {error.strerror}") from None
