"""Files and folders appear whole, or not at all."""

import os

import pytest

from jax_ddpm.io.checkpoint import save_checkpoint
from jax_ddpm.io.files import new_folder, read_json, replace_file, write_file


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
