"""Decoded pictures on the disk: found by content, safe against kills, damage and two writers."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.data import cache as caching
from jax_ddpm.data.rows import FileRows

pytestmark = pytest.mark.usefixtures("untyped")
PREPARATION = Preparation(image_size=12)

# Decodes into the cache, and dies of a real SIGKILL at the second block of pictures.
DIES = """
import os, sys
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.data import cache as caching

die = lambda what, *_: what == "decoding" and os.kill(os.getpid(), 9)
load_dataset(sys.argv[1], Preparation(image_size=12), cache=sys.argv[2], progress=die)
"""
# Reads rows at random, and prints the most memory that it ever held beyond its start, in KiB.
READS = """
import sys
from pathlib import Path
import numpy as np
from jax_ddpm.data import load_dataset

held = lambda: int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before, data = held(), load_dataset(sys.argv[1])
data.digest()
for rows in np.random.default_rng(0).permutation(len(data.images)).reshape(-1, 64):
    data.images[rows]
print(held() - before)
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def expected(few):
    return load_dataset(few, PREPARATION, cache="none").images[:]


def test_the_same_pictures_are_decoded_once(few, expected, tmp_path):
    steps = []
    for flip in (False, True):  # which the step does
        preparation = Preparation(image_size=12, flip=flip)
        data = load_dataset(few, preparation, cache=tmp_path, progress=lambda *x: steps.append(x))
        assert ("reading", 35, 35) in steps and (("decoding", 35, 35) in steps) != flip
        steps.clear()
        assert isinstance(data.images, FileRows)
        np.testing.assert_array_equal(data.images[:], expected)


def test_it_is_keyed_by_content_and_by_preparation(few, tmp_path):
    folder, cache = tmp_path / "few", tmp_path / "cache"
    shutil.copytree(few, folder)
    digest = load_dataset(folder, PREPARATION, cache=cache).digest()
    assert load_dataset(folder, PREPARATION, cache="none").digest() == digest
    load_dataset(folder, Preparation(image_size=8), cache=cache)
    assert len(list(cache.iterdir())) == 2
    path = next(folder.rglob("*L.png"))
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert load_dataset(folder, PREPARATION, cache=cache).digest() != digest
    assert len(list(cache.iterdir())) == 3


def test_arrays_of_the_same_bytes_and_another_shape(tmp_path):
    pixels, digests = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 1), np.uint8), set()
    for images in (pixels, pixels.reshape(4, 40, 30, 1)):
        np.save(tmp_path / "x.npy", images)
        cached = load_dataset(tmp_path / "x.npy", PREPARATION, cache=tmp_path)
        direct = load_dataset(tmp_path / "x.npy", PREPARATION, cache="none")
        np.testing.assert_array_equal(cached.images[:], direct.images[:])
        digests.add(cached.digest())
    assert len(digests) == 2


def test_killed_while_it_is_written(zoo, tmp_path):
    assert run(DIES, zoo, tmp_path).returncode == -signal.SIGKILL
    (leftover,) = tmp_path.iterdir()
    assert leftover.name.startswith(".new-")
    images = load_dataset(zoo, PREPARATION, cache=tmp_path).images[:]
    np.testing.assert_array_equal(images, load_dataset(zoo, PREPARATION, cache="none").images[:])
    (folder,) = tmp_path.iterdir()
    assert not folder.name.startswith(".")


def test_a_writer_that_has_just_begun_is_left_alone(few, expected, tmp_path, monkeypatch):
    """Another process cleans up just before the writer holds its lock."""
    hold, others = caching._hold, [True]

    def late(lock):
        if others:
            others.clear()
            caching._remove_leftovers(tmp_path)
        return hold(lock)

    monkeypatch.setattr(caching, "_hold", late)
    images = load_dataset(few, PREPARATION, cache=tmp_path).images
    np.testing.assert_array_equal(images[:], expected)


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
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * expected.nbytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    data = load_dataset(few, PREPARATION, cache=tmp_path)
    assert "decoded whenever they are needed: 0.0 GiB are not kept" in data.notes
    np.testing.assert_array_equal(data.images[:], expected)
    assert not list(tmp_path.iterdir())


def test_a_picture_that_changes_while_it_is_decoded_leaves_no_set(few, expected, tmp_path):
    shutil.copytree(few, tmp_path / "few")
    path = next((tmp_path / "few").rglob("*L.png"))
    good, cache = path.read_bytes(), tmp_path / "cache"

    def progress(what, done, total):
        if (what, done) == ("reading", total):
            Image.new("L", (30, 30)).save(path)

    with pytest.raises(FieldError, match=f"{path.name} has changed since it was first read"):
        load_dataset(tmp_path / "few", PREPARATION, cache=cache, progress=progress)
    path.write_bytes(good)
    images = load_dataset(tmp_path / "few", PREPARATION, cache=cache).images[:]
    np.testing.assert_array_equal(images, expected)


def test_a_default_cache_that_cannot_be_written_is_done_without(few, tmp_path, monkeypatch):
    def read_only(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("jax_ddpm.data.cache.make_folder", read_only)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    notes = "\n".join(load_dataset(few, PREPARATION).notes)
    assert "not kept (cannot write" in notes and "images: Read-only file system)" in notes
    with pytest.raises(OSError, match="Read-only file system"):
        load_dataset(few, PREPARATION, cache=tmp_path / "mine")


@pytest.mark.slow
def test_a_large_file_is_not_held_in_memory(tmp_path):
    """512 MiB, of which the disk holds next to nothing: the file has holes."""
    np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, (2**13, 128, 128, 4))[7] = 200
    if os.stat(tmp_path / "x.npy").st_blocks * 512 > 2**27:
        pytest.skip("this file system has no holes in files")
    result = run(READS, tmp_path / "x.npy")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100 * 1024


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
