"""What is written comes back to the bit, or is named, whatever happened in between."""

import errno
import hashlib
import json
import os
from functools import partial
from unittest.mock import Mock

import jax
import numpy as np
import optax
import pytest

from jax_ddpm.io.checkpoint import (
    _sealed,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    restore,
    save_checkpoint,
)
from jax_ddpm.io.files import new_folder, read_json, replace_file, write_file

TREE = {"layer": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3).T, "bias": np.ones(2)}}
STATE = {"key": {"impl": "threefry2x32", "data": [0, 7]}, "pending": {"loss": [0.1, None]}}


@pytest.fixture
def saved(tmp_path):
    return save_checkpoint(tmp_path, 12, {"params": TREE, "count": np.int32(5)}, STATE)


def test_everything_comes_back_to_the_bit(tmp_path):
    """In place of an older one of the same step."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
    state = jax.tree.map(lambda x: x + 3, optimizer.init(TREE))
    trees = {"params": TREE, "count": np.int32(5), "optimizer": state}
    save_checkpoint(tmp_path, 12, {"params": TREE}, {})
    path = save_checkpoint(tmp_path, 12, trees, STATE)
    step, arrays, rest = load_checkpoint(path)
    assert (path.name, step, rest) == ("00000012", 12, STATE)
    back = {name: restore(tree, arrays[name]) for name, tree in trees.items()}
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), back, trees)
    assert list(tmp_path.iterdir()) == [path]


def damages(content):
    """A flipped bit in each byte, a byte too few or too many, an empty file, and none."""
    for place, byte in enumerate(content):
        yield content[:place] + bytes([byte ^ 1 << place % 8]) + content[place + 1 :]
    yield from (content[:-1], content + b"\n", b"", None)


def test_every_damage_to_every_file_is_named(saved):
    for path in sorted(saved.iterdir()):
        content = path.read_bytes()
        for damaged in damages(content):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            with pytest.raises(ValueError, match=path.name):
                load_checkpoint(saved)
        path.write_bytes(content)
    load_checkpoint(saved)


def test_a_foreign_manifest_is_refused(saved):
    later = _sealed({"format": 2}), "another version of jax_ddpm wrote it"
    foreign = (b"null", b"[" * 100_000, b'{"format": 1}', b"\xff\xfe{}")
    for content, words in (later, *((each, "damaged") for each in foreign)):
        (saved / "manifest.json").write_bytes(content)
        with pytest.raises(ValueError, match=f"manifest.json: {words}"):
            load_checkpoint(saved)


def test_what_is_not_finite_is_never_kept(saved):
    bad = {"layer": {"kernel": np.array([1.0, np.nan])}}
    with pytest.raises(ValueError, match="params: expected finite numbers, got NaN or inf"):
        save_checkpoint(saved.parent, 13, {"params": bad}, {})
    with pytest.raises(ValueError):
        save_checkpoint(saved.parent, 13, {}, {"loss": float("nan")})
    assert list_checkpoints(saved.parent) == [saved]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_save_leaves_what_was_there(saved, monkeypatch, broken):
    before = {path: path.read_bytes() for path in saved.iterdir()}
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, broken, Mock(side_effect=full))
    for step in (12, 13):
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(saved.parent, step, {"params": TREE}, {})
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in saved.iterdir()} == before
    assert list(saved.parent.iterdir()) == [saved]


def test_the_last_few_and_every_mth_are_kept(tmp_path):
    for step in range(10, 110, 10):
        save_checkpoint(tmp_path, step, {"params": TREE}, {})
    (tmp_path / ".00000999.tmp").mkdir()
    (tmp_path / ".00000050.damaged").mkdir()
    (tmp_path / "notes").mkdir()
    prune_checkpoints(tmp_path, keep=2, keep_every=40)
    kept = {f"{step:08d}" for step in (40, 80, 90, 100)}
    assert {path.name for path in tmp_path.iterdir()} == kept | {".00000050.damaged", "notes"}
    prune_checkpoints(tmp_path, keep=0)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["00000100"]


def test_another_models_arrays_are_named():
    w, b = np.ones((2, 3)), np.ones(3)
    for flat, words in (
        ({"b": b}, r"w: expected float64\[2, 3\], got no array"),
        ({"w": w, "b": b, "v": b}, r"v: expected no array, got float64\[3\]"),
        ({"w": w.T, "b": b}, r"w: expected float64\[2, 3\], got float64\[3, 2\]"),
        ({"w": w.astype(np.float32), "b": b}, "got float32"),
    ):
        with pytest.raises(ValueError, match=words):
            restore({"w": w, "b": b}, flat)


def test_the_manifest_can_be_checked_without_this_library(saved):
    """`sha256sum` is enough: digests are those of the files."""
    for name, entry in json.loads((saved / "manifest.json").read_text())["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def test_a_new_folder_takes_the_place_of_an_empty_one(tmp_path):
    path = tmp_path / "x"
    path.mkdir()
    with pytest.raises(ZeroDivisionError), new_folder(path):
        raise ZeroDivisionError
    assert not list(path.iterdir())
    with new_folder(path) as folder:
        (folder / "a").touch()
        assert not list(path.iterdir())
    assert sorted(tmp_path.rglob("*")) == [path, path / "a"]


def test_what_is_written_and_renamed_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda file: flushed.append(os.fstat(file).st_ino))
    path = save_checkpoint(tmp_path, 1, {}, {})
    replace_file(tmp_path / "a", b"a")
    write_file(tmp_path / "a", b"b", "ab")
    written = [path / "state.json", path / "manifest.json", path, tmp_path]
    written += [tmp_path / "a", tmp_path, tmp_path / "a"]
    assert flushed == [file.stat().st_ino for file in written]


def test_json_of_something_else_is_named(tmp_path):
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(ValueError, match="x.json: expected a JSON object, got list"):
        read_json(tmp_path / "x.json")
