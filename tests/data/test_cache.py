"""Decoded pictures on the disk: found by content, safe against kills, damage and two writers."""

import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
from PIL import Image

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Preparation, load_dataset, pictures
from jax_ddpm.data.files import Files

pytestmark = pytest.mark.usefixtures("untyped")
PREPARATION = Preparation(image_size=12)

LOADS = """
import os, sys, time
from jax_ddpm.data import Preparation, load_dataset
def progress(what, done, total):
    if what == "decoding":
        print("decodes")
        {}
load_dataset(sys.argv[1], Preparation(image_size=12), cache=sys.argv[2], progress=progress)
"""


def command(action, *arguments):
    program = [sys.executable, "-c", LOADS.format(action), *map(str, arguments)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def expected(zoo):
    return load_dataset(zoo, PREPARATION, cache="none").images[:]


@pytest.mark.parametrize("suffix", ["", ".zip"])
def test_a_second_start_opens_no_file(zoo, expected, tmp_path, monkeypatch, suffix):
    """Except what could not be read. What is no picture, or damaged, is named or left out."""
    place, cache, links = shutil.copytree(zoo, tmp_path / "zoo"), tmp_path / "cache", not suffix
    (place / "bright/notes").write_text("no picture")
    (place / "bright/00.png").touch()
    # Its header is whole: only decoding finds that it is cut.
    (place / "dark/y.jfif").write_bytes(next(place.rglob("*RGB.png")).read_bytes()[:-60])
    (place / "dark/z.png").symlink_to("nowhere")  # which no archive takes
    if suffix:
        place = Path(shutil.make_archive(tmp_path / "x", "zip", place))
    real, read, progress = Files.read, [], Mock()
    monkeypatch.setattr(Files, "read", lambda *of: read.append(of[1]) or real(*of))
    load = partial(load_dataset, place, replace(PREPARATION, skip_unreadable=True), cache=cache)
    first = load()
    assert len(set(read)) == 108 + links and len(list(cache.glob("*.pixels"))) == 1
    said = r"left out: [23] \(bright/00.png: no pic.*; dark/y.jfif: \w.*"
    assert re.search(said + "; dark/z.png: No" * links, first.notes[-2])
    read.clear()
    second = load(progress=progress)
    assert read == ["dark/z.png"] * links and "decoding" not in str(progress.mock_calls)
    for data in (second, load(cache="none")):
        assert data.describe() == first.describe() and data.labels.tolist() == first.labels.tolist()
        np.testing.assert_array_equal(data.images[:], expected)
    with pytest.raises(FieldError, match="read bright/00.png: .*; dark/y.jfif.*skip_unread"):
        load_dataset(place, PREPARATION, cache=cache)
    read.clear()
    os.utime(place if suffix else next(place.rglob("*L.png")), ns=(1, 1))
    assert load().digest() == first.digest() and len(set(read)) == (2 if links else 108)
    for record in cache.glob("*.json"):
        record.write_bytes(record.read_bytes()[:-9])
    assert load().digest() == first.digest()


@pytest.mark.parametrize("step", ["survey", "decode"])
def test_what_does_not_fit_into_memory_is_no_fault_of_the_file(tmp_path, monkeypatch, step):
    Image.new("L", (16, 16)).save(tmp_path / "x.bmp")
    load = partial(load_dataset, tmp_path, cache=tmp_path / ".cache")
    with monkeypatch.context() as small:
        small.setattr(pictures, step, Mock(side_effect=MemoryError))
        with pytest.raises(FieldError, match="^data: out of memory$"):
            load()
    assert len(load()) == 1


@pytest.mark.parametrize("free", [0, 2**40])
def test_what_changed_behind_its_size_and_time_is_read_again(tmp_path, monkeypatch, free):
    """By the time of its entry; if that is the same too, once decoding has found it."""
    usage = shutil.disk_usage(tmp_path)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)

    def loaded(level, size=16):
        Image.new("L", (16, 16), level).save(tmp_path / "x.bmp")
        os.utime(tmp_path / "x.bmp", (1, 1))
        how = Preparation(image_size=size)
        return load_dataset(tmp_path, how, cache=tmp_path / ".cache").images[:].max()

    assert (loaded(1), loaded(2)) == (1, 2)
    monkeypatch.setattr("jax_ddpm.data.files.stamp", lambda path: "0 the same")
    assert loaded(3) == 3
    with pytest.raises(FieldError, match="x.bmp has changed since it was first read"):
        loaded(4, size=8)
    assert loaded(4, size=8) == 4


def test_it_is_keyed_by_content_and_by_preparation(zoo, tmp_path):
    folder, cache, digests = shutil.copytree(zoo, tmp_path / "zoo"), tmp_path / "cache", set()
    path = next(folder.rglob("*L.png"))
    for other in ({"image_size": 8}, {"crop": "none"}, {"channels": 1}, {"flip": True}, {}):
        if not other:  # flips are of the step
            Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
        digests |= {load_dataset(folder, replace(PREPARATION, **other), cache=cache).digest()}
    assert len(digests) == 2 and len(list(cache.glob("*.pixels"))) == 5


def test_killed_while_it_is_written(zoo, expected, tmp_path):
    """By a real SIGKILL. What it leaves is removed when the same set is decoded."""
    with command("os.kill(os.getpid(), 9)", zoo, tmp_path) as killed:
        assert killed.wait(300) == -signal.SIGKILL
    (leftover,) = tmp_path.glob("*.tmp")
    (renamed := tmp_path / leftover.name[1:34]).touch()  # KEY-
    images = load_dataset(zoo, PREPARATION, cache=tmp_path).images
    np.testing.assert_array_equal(images, expected)
    assert not leftover.exists() and not renamed.exists()
    os.truncate(images.filename, expected.nbytes - 1)  # a damaged one is decoded again
    np.testing.assert_array_equal(load_dataset(zoo, PREPARATION, cache=tmp_path).images, expected)


def test_without_locks_two_processes_may_decode(zoo, expected, tmp_path, monkeypatch):
    """The second begins and ends while the first decodes."""
    monkeypatch.setattr("fcntl.flock", Mock(side_effect=OSError("no locks")))
    load, found = partial(load_dataset, zoo, PREPARATION, cache=tmp_path), []
    meanwhile = lambda what, *_: what == "decoding" and not found and found.append(load())
    for each in (load(progress=meanwhile), *found):
        np.testing.assert_array_equal(each.images, expected)
    assert len(list(tmp_path.iterdir())) == 3  # SET.json, KEY.pixels and the lock


def test_of_two_processes_one_decodes(zoo, tmp_path):
    """The other waits."""
    progress = Mock()
    with command("time.sleep(2)", zoo, tmp_path) as first:
        assert first.stdout.readline() == "decodes\n"
        load_dataset(zoo, PREPARATION, cache=tmp_path, progress=progress)
        assert first.wait(300) == 0
    assert progress.mock_calls[-1] == call("waiting", 0, 105)


def test_without_room_pictures_are_decoded_when_needed(zoo, expected, tmp_path, monkeypatch):
    """And without a default cache that can be written; one that was asked for is an error."""
    usage = shutil.disk_usage(tmp_path)._replace(free=2 * expected.nbytes - 1)
    with monkeypatch.context() as small:
        small.setattr(shutil, "disk_usage", lambda path: usage)
        data = load_dataset(zoo, PREPARATION, cache=tmp_path)
    assert "decoded whenever they are needed: 0.0 GiB are not kept" in data.notes
    np.testing.assert_array_equal(data.images[:], expected)
    assert not list(tmp_path.glob("*.pixels"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    notes = "\n".join(load_dataset(zoo, PREPARATION).notes)
    assert "cannot write into the cache: [Errno" in notes and "0.0 GiB are not kept" in notes
    with pytest.raises(OSError, match="File exists"):
        load_dataset(zoo, PREPARATION, cache=tmp_path / "file/mine")
    # As in a container whose user has no name. No folder is called ~ then.
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)
    monkeypatch.chdir(tmp_path)
    np.testing.assert_array_equal(load_dataset(zoo, PREPARATION).images[:], expected)
    assert not Path("~").exists()
