"""Decoded pictures on the disk: found by content, safe against kills, damage and two writers."""

import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data import Preparation, load_dataset

pytestmark = pytest.mark.usefixtures("untyped")
PREPARATION = Preparation(image_size=12)

DIES = """
import os, sys
from jax_ddpm.data import Preparation, load_dataset
die = lambda what, *_: what == "decoding" and os.kill(os.getpid(), 9)
load_dataset(sys.argv[1], Preparation(image_size=12), cache=sys.argv[2], progress=die)
"""


@pytest.fixture(scope="module")
def expected(zoo):
    return load_dataset(zoo, PREPARATION, cache="none").images[:]


def test_the_same_pictures_are_decoded_once(zoo, expected, tmp_path):
    for flip in (False, True):  # which the step does
        progress = Mock()
        data = load_dataset(zoo, replace(PREPARATION, flip=flip), cache=tmp_path, progress=progress)
        assert call("reading", 105, 105) in progress.mock_calls
        assert (call("decoding", 105, 105) in progress.mock_calls) != flip
        np.testing.assert_array_equal(data.images[:], expected)


def test_it_is_keyed_by_content_and_by_preparation(zoo, tmp_path):
    folder, cache = shutil.copytree(zoo, tmp_path / "zoo"), tmp_path / "cache"
    digest = load_dataset(folder, PREPARATION, cache=cache).digest()
    for number, other in enumerate(({"image_size": 8}, {"crop": "none"}, {"channels": 1}), 2):
        load_dataset(folder, replace(PREPARATION, **other), cache=cache)
        assert len(list(cache.iterdir())) == number
    path = next(folder.rglob("*L.png"))
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert load_dataset(folder, PREPARATION, cache=cache).digest() != digest
    assert len(list(cache.iterdir())) == 5


def test_killed_while_it_is_written(zoo, expected, tmp_path):
    """By a real SIGKILL. Leftovers are removed; the folder of a writer that just began stays."""
    killed = subprocess.run([sys.executable, "-c", DIES, zoo, tmp_path], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.glob(".new-*")
    new = tmp_path / ".new-without-a-lock-yet"
    new.mkdir()
    (new / ".lock").touch()
    images = load_dataset(zoo, PREPARATION, cache=tmp_path).images[:]
    np.testing.assert_array_equal(images, expected)
    assert new.exists() and not leftover.exists()


def test_two_writers_at_once(zoo, expected, tmp_path):
    """The second begins and ends while the first decodes, which then takes what is there."""
    load, second = partial(load_dataset, zoo, PREPARATION, cache=tmp_path), []

    def progress(what, done, total):
        if what == "decoding" and done == total:
            second.append(load().images[:])

    np.testing.assert_array_equal([load(progress=progress).images[:], *second], [expected] * 2)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "about"])
def test_what_is_damaged_is_decoded_again(zoo, expected, tmp_path, damage):
    load_dataset(zoo, PREPARATION, cache=tmp_path)
    (path,) = tmp_path.glob("*/about.json" if damage == "about" else "*/images.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-50])
    images = load_dataset(zoo, PREPARATION, cache=tmp_path).images[:]
    np.testing.assert_array_equal(images, expected)


def test_without_room_pictures_are_decoded_when_needed(zoo, expected, tmp_path, monkeypatch):
    """And without a default cache that can be written; one that was asked for is an error."""
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * expected.nbytes - 1)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage)
        data = load_dataset(zoo, PREPARATION, cache=tmp_path)
    assert "decoded whenever they are needed: 0.0 GiB are not kept" in data.notes
    np.testing.assert_array_equal(data.images[:], expected)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "not kept (cannot write" in load_dataset(zoo, PREPARATION).notes[-2]
    with pytest.raises(OSError, match="File exists"):
        load_dataset(zoo, PREPARATION, cache=tmp_path / "file/mine")


def test_without_a_home_nothing_is_kept(zoo, expected, tmp_path, monkeypatch):
    """As in a container whose user has no name. No folder is called ~ then."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    for cache in (None, "none"):
        images = load_dataset(zoo, PREPARATION, cache=cache).images
        np.testing.assert_array_equal(images[:], expected)
    assert not list(tmp_path.iterdir())
