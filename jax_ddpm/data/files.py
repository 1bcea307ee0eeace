"""Names to bytes: files of one meaning, wherever they lie, in a folder, a zip or a tar."""

import io
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

from jax_ddpm._errors import FieldError

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""How the names of archives end, in any case."""
_PART = re.compile(
    r"(?<![a-z])[xy]?(train|trn|val|test|tst|dev|eval|pred|hold[-_ ]?out|unlabell?ed|extra|query"
    r"|crossval|(?<=[a-z]_)t[rs])(ing|id|idate|idation|idierung|uation|iction|val)?"
    r"(s?daten|set|data)?[abxy]?(?![a-z])"
)


@dataclass(frozen=True, eq=False)
class Files:
    """Files by relative names, such as "cats/1.png", in their order and without hidden ones."""

    path: Path
    places: dict[str, Any]  # None of an archive's members that are links, or no files
    fetch: Callable[[Any], Any]  # what is at a place
    stamp: Callable[[str], str]  # of a name: its size, and what changes with it; "" if unknown
    packed: bool = False  # a compressed tar, which is read from its beginning to its end

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, place in self.places.items() if place is not None)

    def only(self, names: Iterable[str]) -> "Files":
        """Some of the files, in this order."""
        return replace(self, places={name: self.places[name] for name in names})

    def read(self, name: str) -> Any:
        """The bytes of a file, in any thread. Raises `FieldError`."""
        with _naming(f"{name} in {self.path}"):
            if self.packed:
                raise ValueError("the archive is compressed: unpack it, or decode into a cache")
            return self.fetch(self.places[name])

    def stream(self, names: Collection[str]) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The name of each file, and what reads it as `read` does, in the order of their places."""
        names = sorted(names, key=self.places.__getitem__)
        if not self.packed:
            yield from ((name, partial(self.read, name)) for name in names)
            return
        with _naming(self.path), tarfile.open(self.path) as tar:
            # A file and the hard links to it are of one place, which is read once.
            read = lru_cache(1)(partial(_cut, tar.fileobj))
            for name in names:
                yield name, partial(bytes, read(self.places[name]))


def stamp(path: Path) -> str:
    """The size of a file and when it and its entry were changed; "" if it is not there."""
    with suppress(OSError):
        here = os.stat(path)
        return f"{here.st_size} {here.st_mtime_ns} {here.st_ctime_ns}"
    return ""


def rows(path: Path, count: int, read: Callable[[int], Any], stamp: str) -> Files:
    """Pictures that have a number and no name, and what reads one of them."""
    return Files(path, {f"row {n}": n for n in range(count)}, read, lambda name: stamp)


def open_files(path: Path, *, deep: bool = True) -> Files:
    """The files of a folder, with those behind links and below it if `deep`, or of a .zip or .tar.

    Raises `FieldError` naming what is damaged or no archive.
    """
    with _naming(path):
        if path.is_dir():
            return Files(
                path,
                {name: name for name in sorted(_walk(str(path), deep), key=_parts)},
                lambda name: (path / name).read_bytes(),
                lambda name: stamp(path / name),
            )
        return _open_zip(path) if path.suffix.lower() == ".zip" else _open_tar(path)


def part_of(name: str) -> str | None:
    """The part of a set that a name says, "train" or another; None if it says none."""
    found = _PART.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return found and ("train" if found[1].startswith("tr") else found[1])


def reason(error: BaseException) -> str:
    """The first line of what an error says, without the name of the file."""
    if isinstance(error, FieldError) and error.__cause__:
        return reason(error.__cause__)
    if isinstance(error, MemoryError):
        raise FieldError("data", "out of memory") from error  # which is no fault of the file
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if said.startswith("cannot identify image file"):  # which ends in an address in memory
        return "no picture that Pillow can decode"
    return said.partition("\n")[0]


def _walk(folder: str, deep: bool, prefix: str = "", above: tuple[str, ...] = ()) -> Iterator[str]:
    """The names of the files below a folder, also by links. Only links cost a look at each."""
    here = os.path.realpath(folder)
    if here in above:
        return  # a link that leads back up
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                if deep:
                    yield from _walk(entry.path, deep, f"{prefix}{entry.name}/", (*above, here))
            elif entry.is_file() or entry.is_symlink():  # one that leads nowhere fails when read
                yield prefix + entry.name


def _open_zip(path: Path) -> Files:
    archive, lock, members = zipfile.ZipFile(path), Lock(), {}

    def fetch(place: tuple[int, str, int]) -> bytes:
        with lock:
            return archive.read(place[1])

    for info in archive.infolist():
        name, is_link = info.filename, stat.S_ISLNK(info.external_attr >> 16)
        with suppress(UnicodeError):  # some write UTF-8 and do not say so
            name = name if info.flag_bits & 0x800 else name.encode("cp437").decode()
        if not name.endswith(("/", "\\")):
            place = info.header_offset, info.filename, info.file_size
            members[_cleaned(name)] = None if is_link else place
    return _of_archive(path, members, fetch)


def _open_tar(path: Path) -> Files:
    members = {}
    with tarfile.open(path) as tar:
        file: Any = tar.fileobj
        while (member := tar.next()) is not None:
            # Or it keeps a kilobyte for each.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue]
            name, place = _cleaned(member.name), (member.offset_data, member.size)
            if member.islnk():
                members[name] = members.get(_cleaned(member.linkname))
            elif not member.isdir():
                members[name] = place if member.isreg() and not member.issparse() else None
        file.seek(tar.offset)
        if file.read(tarfile.BLOCKSIZE).strip(b"\0"):  # tarfile takes a damaged header for the end
            raise ValueError(f"expected a header at byte {tar.offset}")
        while file.read(2**20):
            pass  # to the checksum behind the end

    def fetch(place: tuple[int, int]) -> bytes:
        with path.open("rb") as file:  # each its own: threads do not wait for one another
            return _cut(file, place)

    return _of_archive(path, members, fetch, packed=not isinstance(file, io.BufferedReader))


def _cut(file: Any, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _of_archive(
    path: Path, members: dict[str, Any], fetch: Callable[[Any], bytes], packed: bool = False
) -> Files:
    """The members that are not hidden, whose places end in their sizes."""
    found = {}
    for name in sorted(members, key=lambda name: not name.startswith("../")):
        found[re.sub(r"^(\.\./)+", "", name)] = members[name]  # what is inside counts more
    names = sorted(found, key=_parts)
    places = {name: found[name] for name in names if not any(map(_is_hidden, _parts(name)))}
    return Files(path, places, fetch, lambda name: f"{places[name][-1]} {stamp(path)}", packed)


def _cleaned(name: str) -> str:
    """As in a folder: without the root, "./" and Windows' "\\"."""
    return re.sub(r"^([A-Za-z]:)?/+", "", posixpath.normpath(name.replace("\\", "/")))


def _parts(name: str) -> list[str]:
    return name.split("/")


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in ("__MACOSX", "@eaDir")


@contextmanager
def _naming(what: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile's, tarfile's and zlib's errors share no nearer base
        what = getattr(error, "filename", None) or what
        raise FieldError("data", f"cannot read {what}: {reason(error)}") from error
