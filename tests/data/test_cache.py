"""Decoded pictures on the disk: found by content, safe against kills, damage and two writers."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from jax_ddpm._checks import FieldError
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.data.rows import FileRows

pytestmark = pytest.mark.usefixtures("untyped")
PREPARATION = Preparation(image_size=12)

# Decodes into the cache, and dies of a real SIGKILL at the second block of pictures.
DIES = """
import os, signal, sys
from jax_ddpm.data import Preparation, load_dataset

def progress(what, done, total):
    if what == "decoding":
        os.kill(os.getpid(), signal.SIGKILL)

load_dataset(sys.argv[1], Preparation(image_size=12), cache=sys.argv[2], progress=progress)
"""
# Reads 2 GiB of rows at random, and prints the most memory that it ever held beyond its start, in
# KiB.
READS = """
import re, sys
from pathlib import Path
import numpy as np
from jax_ddpm.data import load_dataset

def held():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = held()
data = load_dataset(sys.argv[1])
data.digest()
order = np.random.default_rng(0).permutation(len(data.images))
for rows in order.reshape(-1, 64):
    data.images[rows]
print(held() - before)
"""


def run(code, *arguments):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_same_pictures_are_decoded_once(zoo, tmp_path):
    steps = []

    def progress(what, done, total):
        steps.append((what, done, total))

    first = load_dataset(zoo, PREPARATION, cache=tmp_path, progress=progress)
    assert ("reading", 315, 315) in steps and ("decoding", 315, 315) in steps
    steps.clear()
    again = load_dataset(
        zoo, Preparation(image_size=12, flip=True), cache=tmp_path, progress=progress
    )
    assert {what for what, *_ in steps} == {"reading"}
    np.testing.assert_array_equal(first.images[:], again.images[:])
    assert first.notes[:-1] == again.notes[:-1]
    assert isinstance(again.images, FileRows)


def test_it_is_keyed_by_content_and_by_preparation(zoo, tmp_path):
    folder, cache = tmp_path / "zoo", tmp_path / "cache"
    shutil.copytree(zoo, folder)
    digest = load_dataset(folder, PREPARATION, cache=cache).digest()
    load_dataset(folder, Preparation(image_size=8), cache=cache)
    assert len(list(cache.iterdir())) == 2
    path = next(folder.rglob("*L.png"))
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    changed = load_dataset(folder, PREPARATION, cache=cache)
    assert len(list(cache.iterdir())) == 3 and changed.digest() != digest


def test_killed_while_it_is_written(zoo, tmp_path):
    for _ in range(2):
        assert run(DIES, zoo, tmp_path).returncode == -signal.SIGKILL
        (leftover,) = tmp_path.iterdir()
        assert leftover.name.startswith(".new-")
    expected = load_dataset(zoo, PREPARATION, cache="none").images[:]
    np.testing.assert_array_equal(
        load_dataset(zoo, PREPARATION, cache=tmp_path).images[:], expected
    )
    (folder,) = tmp_path.iterdir()
    assert not folder.name.startswith(".")


def test_two_writers_at_once(zoo, tmp_path):
    found = {}
    together = threading.Barrier(2)

    def load(number):
        def progress(what, done, total):
            if what == "decoding" and done == total:
                together.wait(60)

        data = load_dataset(zoo, PREPARATION, cache=tmp_path, progress=progress)
        found[number] = data.images[:]

    threads = [threading.Thread(target=load, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    np.testing.assert_array_equal(found[0], found[1])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", ["flip", "cut", "about"])
def test_what_is_damaged_is_decoded_again(zoo, tmp_path, damage):
    expected = load_dataset(zoo, PREPARATION, cache=tmp_path).images[:]
    (folder,) = tmp_path.iterdir()
    path = folder / ("about.json" if damage == "about" else "images.bin")
    content = bytearray(path.read_bytes())
    content[1000 % len(content)] ^= 1 if damage == "flip" else 128
    path.write_bytes(content if damage == "flip" else content[:-500])
    images = load_dataset(zoo, PREPARATION, cache=tmp_path).images[:]
    np.testing.assert_array_equal(images, expected)


def test_without_room_pictures_are_decoded_when_they_are_needed(zoo, tmp_path, monkeypatch):
    expected = load_dataset(zoo, PREPARATION, cache=tmp_path / "a")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=200_000))
    data = load_dataset(zoo, PREPARATION, cache=tmp_path / "b")
    assert "decoded whenever they are needed: 0.0 GiB are not kept" in data.notes
    np.testing.assert_array_equal(data.images[:], expected.images[:])
    assert data.digest() == expected.digest() and not list((tmp_path / "b").iterdir())


def test_a_picture_that_changes_while_it_is_decoded_leaves_no_set(zoo, tmp_path):
    shutil.copytree(zoo, tmp_path / "zoo")
    (path, *_) = sorted((tmp_path / "zoo").rglob("*L.png"))
    good = path.read_bytes()

    def progress(what, done, total):
        if (what, done) == ("reading", total):
            Image.new("L", (30, 30)).save(path)

    cache = tmp_path / "cache"
    with pytest.raises(FieldError, match=f"{path.name} has changed since it was first read"):
        load_dataset(tmp_path / "zoo", PREPARATION, cache=cache, progress=progress)
    path.write_bytes(good)
    images = load_dataset(tmp_path / "zoo", PREPARATION, cache=cache).images[:]
    np.testing.assert_array_equal(images, load_dataset(zoo, PREPARATION, cache="none").images[:])


def test_arrays_of_the_same_bytes_and_another_shape(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 30, 40, 1), np.uint8)
    for number, shape in enumerate([(4, 30, 40, 1), (4, 40, 30, 1)]):
        np.save(tmp_path / f"{number}.npy", pixels.reshape(shape))
    cached = [load_dataset(tmp_path / f"{n}.npy", PREPARATION, cache=tmp_path) for n in range(2)]
    direct = [load_dataset(tmp_path / f"{n}.npy", PREPARATION, cache="none") for n in range(2)]
    assert cached[0].digest() != cached[1].digest()
    for ours, expected in zip(cached, direct, strict=True):
        np.testing.assert_array_equal(ours.images[:], expected.images[:])


def test_a_default_cache_that_cannot_be_written_is_done_without(zoo, tmp_path, monkeypatch):
    def read_only(path):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr("jax_ddpm.data.cache.make_folder", read_only)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "nowhere"))
    notes = "\n".join(load_dataset(zoo, PREPARATION).notes)
    assert "not kept (cannot write" in notes and "images: Read-only file system)" in notes
    with pytest.raises(OSError, match="Read-only file system"):
        load_dataset(zoo, PREPARATION, cache=tmp_path / "mine")


def test_a_large_file_is_not_held_in_memory(tmp_path):
    """2 GiB, of which the disk holds next to nothing: the file has holes."""
    shape = (2**15, 128, 128, 4)
    images = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.uint8, shape)
    images[:: 2**12] = 200
    del images
    if os.stat(tmp_path / "x.npy").st_blocks * 512 > 2**28:
        pytest.skip("this file system has no holes in files")
    result = run(READS, tmp_path / "x.npy")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 100 * 1024


def test_rows_are_those_of_the_array(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (50, 4, 5, 3), np.uint8)
    np.save(tmp_path / "x.npy", pixels)
    rows = FileRows.of_array(np.load(tmp_path / "x.npy", mmap_mode="r"))
    indices = np.array([[3, 3, 49], [0, 7, 12]])
    for index in (indices, 7, slice(3, 9), slice(None)):
        np.testing.assert_array_equal(rows[index], pixels[index])
    assert (rows.shape, rows.dtype, len(rows)) == (pixels.shape, pixels.dtype, 50)
    assert rows[0].flags.writeable


def test_rows_of_a_file_that_was_cut_short(tmp_path):
    np.zeros((10, 4, 4, 3), np.uint8).tofile(tmp_path / "rows.bin")
    rows = FileRows(tmp_path / "rows.bin", (10, 4, 4, 3))
    os.truncate(tmp_path / "rows.bin", 9 * 48 + 1)
    assert rows[8].shape == (4, 4, 3)
    with pytest.raises(OSError, match="was cut short while it was read.*rows.bin"):
        rows[9]
    with pytest.raises(IndexError):
        rows[10]


def test_a_large_file_in_another_order(tmp_path, monkeypatch):
    monkeypatch.setattr("jax_ddpm.data.arrays._IN_MEMORY", 0)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 4), np.uint8)
    for order in "CF":
        np.save(tmp_path / "x.npy", np.asarray(pixels, order=order))
        images = load_dataset(tmp_path / "x.npy").images
        assert isinstance(images, FileRows) == (order == "C")
        np.testing.assert_array_equal(images[:], pixels[..., None])
