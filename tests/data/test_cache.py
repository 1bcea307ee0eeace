"""Decoded pictures on the disk: found by content, safe against kills, damage and two writers."""

import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.data.rows import FileRows

pytestmark = pytest.mark.usefixtures("untyped")
PREPARATION = Preparation(image_size=12)

# Decodes into the cache, and dies of a real SIGKILL at the second block of pictures.
DIES = """
import os, sys
from jax_ddpm.data import Preparation, load_dataset

die = lambda what, *_: what == "decoding" and os.kill(os.getpid(), 9)
load_dataset(sys.argv[1], Preparation(image_size=12), cache=sys.argv[2], progress=die)
"""


@pytest.fixture(scope="module")
def expected(few):
    return load_dataset(few, PREPARATION, cache="none").images[:]


def test_the_same_pictures_are_decoded_once(few, expected, tmp_path):
    for flip in (False, True):  # which the step does
        progress = Mock()
        data = load_dataset(few, replace(PREPARATION, flip=flip), cache=tmp_path, progress=progress)
        assert call("reading", 35, 35) in progress.mock_calls
        assert (call("decoding", 35, 35) in progress.mock_calls) != flip
        assert isinstance(data.images, FileRows)
        np.testing.assert_array_equal(data.images[:], expected)


def test_it_is_keyed_by_content_and_by_preparation(few, tmp_path):
    folder, cache = tmp_path / "few", tmp_path / "cache"
    shutil.copytree(few, folder)
    digest = load_dataset(folder, PREPARATION, cache=cache).digest()
    assert load_dataset(folder, PREPARATION, cache="none").digest() == digest
    for number, other in enumerate(({"image_size": 8}, {"crop": "none"}, {"channels": 1}), 2):
        load_dataset(folder, replace(PREPARATION, **other), cache=cache)
        assert len(list(cache.iterdir())) == number
    path = next(folder.rglob("*L.png"))
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert load_dataset(folder, PREPARATION, cache=cache).digest() != digest
    assert len(list(cache.iterdir())) == 5


def test_arrays_of_the_same_bytes_and_another_shape(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 1), np.uint8)
    for images in (pixels, pixels.reshape(4, 40, 30, 1)):
        np.save(tmp_path / "x.npy", images)
        caches = [tmp_path / "cache", "none"]
        data = [load_dataset(tmp_path / "x.npy", PREPARATION, cache=cache) for cache in caches]
        np.testing.assert_array_equal(*[each.images[:] for each in data])


def test_killed_while_it_is_written(zoo, tmp_path):
    """Its leftovers are removed; the folder of a writer that has just begun stays."""
    killed = subprocess.run([sys.executable, "-c", DIES, zoo, tmp_path], timeout=300)
    assert killed.returncode == -signal.SIGKILL
    (leftover,) = tmp_path.glob(".new-*")
    new = tmp_path / ".new-without-a-lock-yet"
    new.mkdir()
    (new / ".lock").touch()
    images = load_dataset(zoo, PREPARATION, cache=tmp_path).images[:]
    np.testing.assert_array_equal(images, load_dataset(zoo, PREPARATION, cache="none").images[:])
    assert new.exists() and not leftover.exists()


def test_two_writers_at_once(few, expected, tmp_path):
    together = threading.Barrier(2)

    def progress(what, done, total):
        if what == "decoding" and done == total:
            together.wait(60)

    def load(_):
        return load_dataset(few, PREPARATION, cache=tmp_path, progress=progress).images[:]

    with ThreadPoolExecutor(2) as threads:
        np.testing.assert_array_equal(list(threads.map(load, range(2))), [expected] * 2)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "about"])
def test_what_is_damaged_is_decoded_again(few, expected, tmp_path, damage):
    load_dataset(few, PREPARATION, cache=tmp_path)
    (path,) = tmp_path.glob("*/about.json" if damage == "about" else "*/images.bin")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "flip" else content[:-50])
    images = load_dataset(few, PREPARATION, cache=tmp_path).images[:]
    np.testing.assert_array_equal(images, expected)


def test_without_room_pictures_are_decoded_when_needed(few, expected, tmp_path, monkeypatch):
    """And without a default cache that can be written; one that was asked for is an error."""
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * expected.nbytes - 1)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage)
        data = load_dataset(few, PREPARATION, cache=tmp_path)
    assert "decoded whenever they are needed: 0.0 GiB are not kept" in data.notes
    np.testing.assert_array_equal(data.images[:], expected)
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert "not kept (cannot write" in load_dataset(few, PREPARATION).notes[-2]
    with pytest.raises(OSError, match="File exists"):
        load_dataset(few, PREPARATION, cache=tmp_path / "file/mine")


def test_without_a_home_nothing_is_kept(few, expected, tmp_path, monkeypatch):
    """As in a container whose user has no name. No folder is called ~ then."""
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    for cache in (None, "none"):
        images = load_dataset(few, PREPARATION, cache=cache).images
        np.testing.assert_array_equal(images[:], expected)
    assert not list(tmp_path.iterdir())
