"""The same files, whether in a folder, a zip or a tar."""

import bz2
import gzip
import io
import lzma
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
NAMES = ("b.txt", "cats/10.png", "cats/9.png", "cats/old/1.png", "cats-2/1.png", "dögs/ü.png")


def write_folder(path, files):
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("cats")
        for name, data in files.items():
            archive.writestr(name, data)


def write_tar(path, files, mode="w"):
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo("cats")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def write(path, files):
    if not path.suffix:
        write_folder(path, files)
    elif path.suffix == ".zip":
        write_zip(path, files)
    else:
        kind = {"gz": "gz", "tgz": "gz", "bz2": "bz2", "tbz2": "bz2", "xz": "xz", "txz": "xz"}
        write_tar(path, files, f"w:{kind.get(path.suffix[1:], '')}")


@pytest.fixture(params=["folder", *("x" + each for each in ARCHIVES), "X.ZIP", "X.TAR"])
def path(request, tmp_path):
    return tmp_path / request.param


def is_compressed(path):
    return bool(path.suffix) and path.suffix.lower() not in (".zip", ".tar")


def test_every_kind_holds_the_same(path):
    reversed_names = dict(reversed(FILES.items()))
    write(path.with_name(path.name.lower()), reversed_names | dict.fromkeys(HIDDEN, b"hidden"))
    os.rename(path.with_name(path.name.lower()), path)
    files = open_files(str(path))
    assert files.path == path
    assert files.names == NAMES
    streamed = list(files.stream())
    assert len(streamed) == len(FILES)
    assert dict(streamed) == FILES
    if path.suffix:  # as they lie
        assert [name for name, _ in streamed] == list(reversed_names)
    else:
        assert tuple(name for name, _ in streamed) == NAMES
    if is_compressed(path):
        with pytest.raises(ValueError, match=f"{re.escape(str(path))}.*unpack it"):
            files.read("b.txt")
    else:
        assert {name: files.read(name) for name in NAMES} == FILES


def test_only_what_is_wanted_is_streamed(path):
    write(path.with_name(path.name.lower()), FILES)
    os.rename(path.with_name(path.name.lower()), path)
    files = open_files(path)
    wanted = ["cats/9.png", "b.txt", "b.txt"]
    assert sorted(files.stream(wanted)) == [(name, FILES[name]) for name in ("b.txt", "cats/9.png")]
    assert list(files.stream([])) == []
    for unknown in ("c.txt", "../x", "cats/.DS_Store", "cats"):
        with pytest.raises(ValueError, match=re.escape(f"no file {unknown} in {path}")):
            list(files.stream([unknown]))


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz"])
def test_members_that_climb_out_and_links_are_left_out(tmp_path, name):
    path = tmp_path / name
    evil = ["../evil.png", "a/../../evil.png", "/evil.png", "a/../b.png", ".", "./.b"]
    files = {"./a/1.png": b"1", "a//2.png": b"2", **dict.fromkeys(evil, b"evil")}
    write(path, files)
    if name == "x.zip":
        link = zipfile.ZipInfo("a/link.png")
        link.create_system = 3
        link.external_attr = 0o120777 << 16
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(link, "/etc/passwd")
    else:
        mode = "w:gz" if name.endswith("gz") else "w"
        with tarfile.open(path, mode) as archive:
            kinds = {"sym": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "pipe": tarfile.FIFOTYPE}
            for each, kind in kinds.items():
                member = tarfile.TarInfo(f"a/{each}.png")
                member.type, member.linkname = kind, "/etc/passwd"
                archive.addfile(member)
            for each, data in files.items():
                member = tarfile.TarInfo(each)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    found = open_files(path)
    assert found.names == ("a/1.png", "a/2.png")
    assert dict(found.stream()) == {"a/1.png": b"1", "a/2.png": b"2"}


@pytest.mark.parametrize("name", ["x.tar", "x.tar.xz"])
def test_the_last_of_a_name_counts(tmp_path, name):
    write(tmp_path / name, {"a": b"old", "./a": b"new", "b": b"b"})
    files = open_files(tmp_path / name)
    assert files.names == ("a", "b")
    assert list(files.stream()) == [("a", b"new"), ("b", b"b")]


def test_links_in_a_folder_are_followed_once(tmp_path):
    write_folder(tmp_path / "elsewhere", {"deep/1.png": b"1"})
    write_folder(tmp_path / "folder", {"a/2.png": b"2"})
    (tmp_path / "folder/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "folder/a/up").symlink_to(tmp_path / "folder")
    (tmp_path / "elsewhere/here").symlink_to(".")
    (tmp_path / "folder/3.png").symlink_to(tmp_path / "elsewhere/deep/1.png")
    files = open_files(tmp_path / "folder")
    assert files.names == ("3.png", "a/2.png", "link/deep/1.png")
    assert files.read("3.png") == files.read("link/deep/1.png") == b"1"


def test_a_link_that_leads_nowhere_is_named(tmp_path):
    (tmp_path / "1.png").symlink_to(tmp_path / "gone")
    files = open_files(tmp_path)
    assert files.names == ("1.png",)
    expected = f"cannot read 1.png in {tmp_path}: No such file or directory"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        files.read("1.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    assert open_files(tmp_path).names == ()


@pytest.mark.parametrize("name", ["folder", "x.zip", "x.tar"])
def test_threads_read_at_once(tmp_path, name):
    path = tmp_path / name
    contents = {f"{number:03}": os.urandom(1 + 97 * number) for number in range(200)}
    write(path, contents)
    files = open_files(path)
    with ThreadPoolExecutor(8) as pool:
        names = list(contents) * 5
        assert list(pool.map(files.read, names)) == [contents[name] for name in names]


def test_what_is_no_archive_is_named(tmp_path):
    missing = tmp_path / "none.zip"
    with pytest.raises(ValueError, match=f"^no such file or folder: {re.escape(str(missing))}$"):
        open_files(missing)
    other = tmp_path / "x.rar"
    other.write_bytes(b"")
    with pytest.raises(ValueError, match=f"^expected a folder or .*, got {re.escape(str(other))}$"):
        open_files(other)


@pytest.mark.parametrize("suffix", ARCHIVES)
@pytest.mark.parametrize("damage", ["empty", "text", "half", "first half of the end"])
def test_damaged_archives_are_named_in_one_line(tmp_path, suffix, damage):
    path = tmp_path / f"x{suffix}"
    write(path, {f"{number}.png": os.urandom(5000) for number in range(20)})
    content = path.read_bytes()
    # A tar that is not compressed ends with 10,240 bytes at most, which say nothing.
    end = len(content) - (12_000 if suffix == ".tar" else 4)
    cut = {"empty": 0, "half": len(content) // 2, "first half of the end": end}
    path.write_bytes(b"hello" * 999 if damage == "text" else content[: cut[damage]])
    line = f"cannot read {re.escape(str(path))}: [^\n]+"
    with pytest.raises(ValueError, match=f"^{line}$") as caught:
        open_files(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_with_a_damaged_header_does_not_end_there(tmp_path, pack):
    plain = tmp_path / "plain.tar"
    write_tar(plain, {"1": b"1", "2": b"2", "3": b"3"})
    content = bytearray(plain.read_bytes())
    assert content[512 * 3] == ord("2")
    content[512 * 3] ^= 1
    path = tmp_path / "x.tar"  # what it is packed with shows inside
    path.write_bytes(pack(bytes(content)))
    with pytest.raises(ValueError, match="x.tar: expected a header at byte 1536"):
        open_files(path)


@pytest.mark.parametrize("suffix", [".tar.gz", ".zip"])
def test_flipped_bits_are_seen_when_read(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    write(path, {"1.png": os.urandom(50_000)})
    content = bytearray(path.read_bytes())
    content[25_000] ^= 16
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"^cannot read .*{re.escape(str(path))}: "):
        open_files(path).read("1.png")


def test_a_tar_that_was_cut_since_is_named(tmp_path):
    path = tmp_path / "x.tar"
    write(path, {"1.png": bytes(5000)})
    files = open_files(path)
    os.truncate(path, 2000)
    with pytest.raises(ValueError, match=f"cannot read 1.png in {path}: expected 5000 bytes, got "):
        files.read("1.png")


def test_a_zip_with_a_password_is_named(tmp_path):
    path = tmp_path / "x.zip"
    write(path, {"1.png": b"1"})
    content = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.rindex(signature) + place] |= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot read 1.png in .*x.zip: .*encrypted"):
        open_files(path).read("1.png")


def test_sparse_files_in_a_tar_are_refused(tmp_path):
    member = tarfile.TarInfo("1.png")
    member.size = 4
    member.pax_headers = {"GNU.sparse.map": "0,4", "GNU.sparse.size": "100"}
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member, io.BytesIO(b"data"))
    with pytest.raises(ValueError, match="x.tar: 1.png is sparse; unpack the archive"):
        open_files(tmp_path / "x.tar")
