"""The same files, whether in a folder, a zip or a tar."""

import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_ddpm.data.files import ARCHIVES, open_files

FILES = {"b.txt": b"text", "cats/10.png": b"ten", "cats/9.png": b"nine" * 1000}
FILES |= {"cats/old/1.png": b"", "cats-2/1.png": b"dash", "dögs/ü.png": b"umlauts"}


def contents(files):
    return [(name, read()) for name, read in files.stream(files.names)]


HIDDEN = [".a", "cats/.DS_Store", ".git/x.png", "__MACOSX/cats/._1.png", "cats/__MACOSX/1.png"]
HIDDEN += ["cats/@eaDir/9.png/SYNOPHOTO_THUMB_M.png"]


@pytest.mark.parametrize("name", ["folder", *("x" + each for each in ARCHIVES), "X.ZIP", "X.TAR"])
def test_every_kind_holds_the_same(tmp_path, name, write_files):
    reversed_names = dict(reversed(FILES.items()))
    path = write_files(tmp_path / name, reversed_names | dict.fromkeys(HIDDEN, b"hidden"))
    files = open_files(path)
    assert files.names == tuple(FILES)
    order = reversed_names if path.suffix else sorted(FILES)
    assert contents(files) == [(name, FILES[name]) for name in order]
    if path.suffix.lower() in ("", ".zip", ".tar"):
        names = list(FILES) * 50
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(files.read, names)) == [FILES[name] for name in names]
    else:
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}: .*unpack it, or decode"):
            files.read("b.txt")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_names_are_those_within_the_archive_and_links_are_left_out(tmp_path, name, write_files):
    """Without the root, with Windows' separators; a tar's hard links are files."""
    hidden = dict.fromkeys([".", "./.b", "a/..\\.b\\c"], b"hidden")
    files = {"a/1.png": b"old", "./a/1.png": b"1", "a//2.png": b"2", "/home/3.png": b"3"}
    files |= {"../home/3.png": b"not within", ".../7.png": b"hidden"}
    files |= {"C:\\pics\\4.png": b"4", "\\\\host\\5.png": b"5", "../up/6.png": b"6", **hidden}
    links = {"b/hard.png": "./a/2.png", "z.png": "a//2.png", "b/deep": "../a", "hard": "gone"}
    found = open_files(write_files(tmp_path / name, files | links))
    inside = {"a/1.png": b"1", "a/2.png": b"2", "b/hard.png": b"2", "home/3.png": b"3"}
    inside |= {"host/5.png": b"5", "pics/4.png": b"4", "up/6.png": b"6"}
    if name == "x.zip":
        del inside["b/hard.png"]
    assert dict(contents(found)) == inside
    assert found.places.keys() - {*found.names} == links.keys() - inside.keys()


def test_links_in_a_folder_are_followed_once(tmp_path, write_files):
    write_files(tmp_path / "elsewhere", {"deep/1.png": b"1"})
    folder = write_files(tmp_path / "folder", {"a/2.png": b"2"})
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "a/up").symlink_to(folder)
    (tmp_path / "elsewhere/here").symlink_to(".")
    (folder / "3.png").symlink_to(tmp_path / "elsewhere/deep/1.png")
    (folder / "z.png").symlink_to(tmp_path / "gone")
    os.mkfifo(folder / "pipe.png")  # no file
    files = open_files(folder)
    assert files.names == ("3.png", "a/2.png", "link/deep/1.png", "z.png")
    assert files.read("3.png") == files.read("link/deep/1.png") == b"1"
    with pytest.raises(ValueError, match=f"^data: cannot read {folder}/z.png: No such file"):
        files.read("z.png")


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("damage", ["end", "flip", "empty"])
def test_damaged_archives_are_named_in_one_line(tmp_path, suffix, damage, write_files):
    path = write_files(tmp_path / f"x{suffix}", {f"{n}.png": os.urandom(5000) for n in range(20)})
    content = bytearray(path.read_bytes())
    if damage == "flip":  # a tar has no checksums of what lies in it, only of names
        content[content.index(b"7.png") if suffix == ".tar" else len(content) // 2] ^= 16
    # A tar that is not compressed ends with 10,240 bytes at most, which say nothing.
    cut = {"flip": 0, "end": 12_000 if suffix == ".tar" else 4, "empty": len(content)}[damage]
    path.write_bytes(content[: len(content) - cut])
    with pytest.raises(ValueError, match=f"^data: cannot read .*{re.escape(str(path))}: [^\n]+$"):
        contents(open_files(path))  # a zip says it when it is read


def test_what_a_tar_does_not_hold_whole_is_left_out(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        sparse = tarfile.TarInfo("a.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
    assert open_files(tmp_path / "x.tar").places == {"a.png": None}


@pytest.mark.parametrize("bits", [b"\0", b"\x08"])
def test_names_in_a_zip_that_does_not_say_it_is_utf8(tmp_path, bits, write_files):
    path = write_files(tmp_path / "x.zip", {"dög\\ü.png": b"1", "dög\\": b""})
    version, flags = b"PK\x01\x02\x14\x03\x14\0\0", b"\x08"
    path.write_bytes(path.read_bytes().replace(version + flags, version + bits))
    assert open_files(path).names == ("dög/ü.png",)
