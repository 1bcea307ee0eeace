"""The same files, whether in a folder, a zip or a tar."""

import gzip
import io
import os
import re
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from jax_ddpm.data.files import ARCHIVES, open_files

FILES = {
    "b.txt": b"text",
    "cats/10.png": b"ten",
    "cats/9.png": b"nine" * 1000,
    "cats/old/1.png": b"",
    "cats-2/1.png": b"dash",
    "dögs/ü.png": b"umlauts",
}
HIDDEN = [".a", "cats/.DS_Store", ".git/x.png", "__MACOSX/cats/._1.png", "cats/__MACOSX/1.png"]


@pytest.mark.parametrize("name", ["folder", *("x" + each for each in ARCHIVES), "X.ZIP", "X.TAR"])
def test_every_kind_holds_the_same(tmp_path, name, write_files):
    reversed_names = dict(reversed(FILES.items()))
    path = write_files(tmp_path / name, reversed_names | dict.fromkeys(HIDDEN, b"hidden"))
    files = open_files(str(path))
    assert files.path == path and files.names == tuple(FILES)
    streamed = list(files.stream())
    as_they_lie = reversed_names if path.suffix else FILES
    assert dict(streamed) == FILES and [name for name, _ in streamed] == list(as_they_lie)
    wanted = ["cats/9.png", "b.txt", "b.txt"]
    assert sorted(files.stream(wanted)) == [(name, FILES[name]) for name in ("b.txt", "cats/9.png")]
    for unknown in ("c.txt", "../x", "cats/.DS_Store", "cats"):
        with pytest.raises(ValueError, match=re.escape(f"no file {unknown} in {path}")):
            list(files.stream([unknown]))
    if path.suffix.lower() in ("", ".zip", ".tar"):
        names = list(FILES) * 50
        with ThreadPoolExecutor(8) as threads:
            assert list(threads.map(files.read, names)) == [FILES[name] for name in names]
    else:
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*unpack it"):
            files.read("b.txt")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_members_that_climb_out_are_left_out(tmp_path, name, write_files):
    """And the last of a name counts; a name from a root is one from the archive's."""
    evil = ["../evil.png", "a/../../evil.png", "..\\b.png", "c/../../b.png", ".", "./.b"]
    files = {"a/1.png": b"old", "./a/1.png": b"1", "a//2.png": b"2", "/home/3.png": b"3"}
    files |= {"C:\\pics\\4.png": b"4", "\\\\host\\5.png": b"5", **dict.fromkeys(evil, b"evil")}
    found = open_files(write_files(tmp_path / name, files))
    assert found.names == ("a/1.png", "a/2.png", "home/3.png", "host/5.png", "pics/4.png")
    assert [data for _, data in sorted(found.stream())] == [b"1", b"2", b"3", b"5", b"4"]
    links = {"link.png"} if name == "x.zip" else {"hard.png", "sym.png"}
    assert set(found.left_out) == {*links, "../evil.png", "../b.png"}


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
    with pytest.raises(ValueError, match=f"^cannot read z.png in {folder}: No such file or direct"):
        files.read("z.png")


def test_what_is_no_archive_is_named(tmp_path):
    (tmp_path / "x.rar").write_bytes(b"")
    for name, expected in {"none.zip": "no such file or folder: ", "x.rar": "expected a f"}.items():
        with pytest.raises(ValueError, match=f"^{expected}.*{tmp_path}/{name}$"):
            open_files(tmp_path / name)


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("damage", ["end", "flip", "empty"])
def test_damaged_archives_are_named_in_one_line(tmp_path, suffix, damage, write_files):
    path = write_files(tmp_path / f"x{suffix}", {f"{n}.png": os.urandom(5000) for n in range(20)})
    content = path.read_bytes()
    # A tar that is not compressed ends with 10,240 bytes at most, which say nothing.
    end = len(content) - (12_000 if suffix == ".tar" else 4)
    # It has no checksums of what lies in it, only of names.
    flipped = content.index(b"7.png") if suffix == ".tar" else len(content) // 2
    damaged = {
        "end": content[:end],
        "empty": b"",
        "flip": content[:flipped] + bytes([content[flipped] ^ 16]) + content[flipped + 1 :],
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=f"^cannot read .*{re.escape(str(path))}: [^\n]+$"):
        files = open_files(path)
        files.read_all(files.names)  # a zip says it here


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_tar_with_a_damaged_header_does_not_end_there(tmp_path, write_files, pack):
    path = write_files(tmp_path / "x.tar", {"1": b"1", "2": b"2"})
    content = bytearray(path.read_bytes())
    start = content.index(b"2" + bytes(99))
    content[start] ^= 1
    path.write_bytes(pack(bytes(content)))  # what it is packed with shows inside
    with pytest.raises(ValueError, match=f"x.tar: expected a header at byte {start}"):
        open_files(path)


def test_a_tar_that_was_cut_since_is_named(tmp_path, write_files):
    path = write_files(tmp_path / "x.tar", {"1.png": bytes(5000)})
    files = open_files(path)
    os.truncate(path, 4000)
    with pytest.raises(ValueError, match=f"cannot read 1.png in {path}: expected 5000 bytes, got "):
        files.read("1.png")


def test_sparse_files_are_refused(tmp_path):
    member = tarfile.TarInfo("1.png")
    member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "100"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    with pytest.raises(ValueError, match="x.tar: 1.png is sparse; unpack the archive"):
        open_files(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_links_within_an_archive_are_followed(tmp_path, name, write_files):
    """Hard ones go by the names of members, symbolic ones from where they lie."""
    links = {"b/hard.png": "a/1.png", "b/sym.png": "../a/1.png", "b/out.png": "../../a/1.png"}
    path = write_files(tmp_path / name, {"a/1.png": b"1", "a/2.png": b""})
    if name == "x.zip":
        with zipfile.ZipFile(path, "a") as archive:
            for link, target in links.items():
                info = zipfile.ZipInfo(link)
                info.create_system, info.external_attr = 3, 0o120777 << 16
                archive.writestr(info, target if "hard" not in link else "../a/1.png")
    else:
        with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as archive:
            for link, target in {"a/1.png": "", "a/2.png": "", **links}.items():
                member = tarfile.TarInfo(link)
                if target:
                    member.type = tarfile.LNKTYPE if "hard" in link else tarfile.SYMTYPE
                    member.linkname = target
                member.size = int(link == "a/1.png")
                archive.addfile(member, io.BytesIO(b"1"))
    files = open_files(path)
    expected = {"a/1.png": b"1", "a/2.png": b"", "b/hard.png": b"1", "b/sym.png": b"1"}
    assert dict(files.stream()) == expected and "b/out.png" in files.left_out
    assert list(files.stream(["b/sym.png"])) == [("b/sym.png", b"1")]


@pytest.mark.parametrize("bits", [0, 0x800])
def test_names_in_a_zip_that_does_not_say_it_is_utf8(tmp_path, bits, write_files):
    path = write_files(tmp_path / "x.zip", {"dög\\ü.png": b"1", "dög\\": b""})
    path.write_bytes(
        path.read_bytes().replace(
            b"PK\x01\x02\x14\x03\x14\0\0\x08", b"PK\x01\x02\x14\x03\x14\0\0" + bytes([bits >> 8])
        )
    )
    assert open_files(path).names == ("dög/ü.png",)
