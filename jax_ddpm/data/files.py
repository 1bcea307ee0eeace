"""Names to bytes: files of one meaning, wherever they lie, in a folder, a zip or a tar."""

import io
import os
import posixpath
import re
import stat
import tarfile
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Any

Member = tuple[str, Any, str | None]
"""Its name, its place, and of a link where it leads ("" of what is neither a link nor a file)."""

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
"""How the names of archives end, in any case."""
_PART = re.compile(
    r"(?<![a-z])[xy]?(train|trn|val|test|tst|dev|eval|pred|hold[-_ ]?out|unlabell?ed|extra|query"
    r"|crossval|(?<=[a-z]_)t[rs])(ing|id|idate|idation|idierung|uation|iction|val)?"
    r"(s?daten|set|data)?[abxy]?(?![a-z])"
)


class Unreadable(ValueError):
    """Says what cannot be read; `reason` is why."""

    def __init__(self, what: object, reason: str) -> None:
        super().__init__(f"cannot read {what}: {reason}")
        self.reason = reason


class Files:
    """Files in `path` by relative names, such as "cats/1.png", in the order of their parts, without
    hidden ones. `left_out` names members of an archive that are no file, lead to none, or lie
    outside of it.
    """

    channels = None

    def __init__(self, path: Path, places: dict[str, Any], left_out: tuple[str, ...] = ()) -> None:
        self.path, self.left_out = path, left_out
        self.names = tuple(sorted(places, key=_parts))
        self._places = places

    def only(self, names: Sequence[str]) -> "Files":
        """Some of the files, in this order."""
        some = copy(self)
        some.names = tuple(names)
        return some

    def read(self, name: str, most: int = -1) -> Any:
        """The bytes of a file, or the first of them, in any thread. Raises `Unreadable`."""
        with _naming(f"{name} in {self.path}"):
            return self._read(name, self._places[name], most)

    def stream(
        self, names: Collection[str], most: int = -1
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The name of each file, and what reads it as `read` does, in the order that is fastest."""
        for name in sorted(names, key=self._places.__getitem__):
            yield name, partial(self.read, name, most)

    def stamp(self, name: str) -> str:
        """What is another once a file is another; "" where nothing says so."""
        return stamp(self.path)

    def _read(self, name: str, place: Any, most: int) -> bytes:
        raise NotImplementedError


class Rows(Files):
    """Pictures that have a number and no name, and what reads one of them.

    `channels` are those of an array, which stay where no others are asked for.
    """

    def __init__(
        self, kind: str, count: int, read: Callable[[int], Any], stamp: str, channels: Any = None
    ) -> None:
        super().__init__(Path(), {f"{kind} {index}": index for index in range(count)})
        self.names = tuple(self._places)
        self._row, self._stamp, self.channels = read, stamp, channels

    def read(self, name: str, most: int = -1) -> Any:
        return self._row(self._places[name])

    def stamp(self, name: str) -> str:
        return self._stamp


def stamp(path: Path) -> str:
    """The size of a file and when it and its entry were changed; "" if it is not there."""
    with suppress(OSError):
        here = os.stat(path)
        return f"{here.st_size} {here.st_mtime_ns} {here.st_ctime_ns}"
    return ""


def open_files(path: Path, *, deep: bool = True) -> Files:
    """The files of a folder, with those behind links and below it if `deep`, or of a .zip or .tar.

    A compressed tar is read from beginning to end, by `stream`, and `read` refuses. Raises
    `ValueError` naming what is damaged or no archive.
    """
    if path.is_dir():
        return _Folder(path, deep)
    return _Zip(path) if path.suffix.lower() == ".zip" else _Tar(path)


def part_of(name: str) -> str | None:
    """The part of a set that a name says, "train" or another; None if it says none."""
    found = _PART.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return found and ("train" if found[1].startswith("tr") else found[1])


def reason(error: Exception) -> str:
    """The first line of what an error says, without an object's address in memory."""
    if isinstance(error, Unreadable):
        return error.reason
    said = getattr(error, "strerror", None) or str(error)
    said = said.partition("\n")[0].partition(" <_io.")[0] or type(error).__name__
    said = re.sub("^File <.*> is ", "it is ", said)  # as zipfile says what is encrypted
    return said.replace("cannot identify image file", "no picture that Pillow can decode")


class _Folder(Files):
    def __init__(self, path: Path, deep: bool) -> None:
        try:
            super().__init__(path, dict.fromkeys(_walk(str(path), deep), 0))
        except OSError as error:
            raise Unreadable(error.filename or path, reason(error)) from None

    def stamp(self, name: str) -> str:
        return stamp(self.path / name)

    def _read(self, name: str, place: Any, most: int) -> bytes:
        with (self.path / name).open("rb") as file:
            return file.read(most)


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


class _Zip(Files):
    def __init__(self, path: Path) -> None:
        with _naming(path):
            self._zip = zipfile.ZipFile(path)
            self._infos = {info.header_offset: info for info in self._zip.infolist()}
            super().__init__(path, *_placed(map(self._member, self._zip.infolist())))
        self._lock = Lock()

    def _member(self, info: zipfile.ZipInfo) -> Member:
        name, is_link = info.filename, stat.S_ISLNK(info.external_attr >> 16)
        with suppress(UnicodeError):  # some write UTF-8 and do not say so
            name = name if info.flag_bits & 0x800 else name.encode("cp437").decode()
        return name, info.header_offset, os.fsdecode(self._zip.read(info)) if is_link else None

    def _read(self, name: str, place: int, most: int) -> bytes:
        with self._lock, self._zip.open(self._infos[place]) as file:
            return file.read(most)


class _Tar(Files):
    def __init__(self, path: Path) -> None:
        with _naming(path), tarfile.open(path) as tar:
            file: Any = tar.fileobj
            self._is_plain = isinstance(file, io.BufferedReader)
            super().__init__(path, *_placed(_members(tar)))
            # tarfile takes a damaged header for the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"expected a header at byte {tar.offset}")
            while not self._is_plain and file.read(2**20):
                pass  # to the checksum behind the end

    def stream(
        self, names: Collection[str], most: int = -1
    ) -> Iterator[tuple[str, Callable[[], Any]]]:
        if self._is_plain:
            yield from super().stream(names, most)
            return
        with _naming(self.path), tarfile.open(self.path) as tar:
            # A file and the links to it are of one place, which is read once.
            read = lru_cache(1)(lambda place: _cut(tar.fileobj, place, most))
            for name in sorted(names, key=self._places.__getitem__):
                yield name, partial(bytes, read(self._places[name]))

    def _read(self, name: str, place: Any, most: int) -> bytes:
        if not self._is_plain:
            raise ValueError("the archive is compressed: unpack it, or decode into a cache")
        with self.path.open("rb") as file:  # each its own: threads do not wait for one another
            return _cut(file, place, most)


def _cut(file: Any, place: tuple[int, int], most: int) -> bytes:
    offset, size = place
    size = size if most < 0 else min(size, most)
    file.seek(offset)
    data = file.read(size)
    if len(data) != size:
        raise ValueError(f"expected {size} bytes, got {len(data)}")
    return data


def _members(tar: Any) -> Iterator[Member]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # or it keeps a kilobyte for each
        if member.issparse():
            raise ValueError(f"{member.name} is sparse; unpack the archive")
        # A hard link's target is named as from the root, that of another from where the link lies.
        target = f"/{member.linkname}" if member.islnk() else member.linkname
        if not member.isdir():
            place = member.offset_data, member.size
            yield member.name, place, None if member.isreg() else target


def _placed(members: Iterable[Member]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The places of an archive's members, and what is left out; the last of a name counts."""
    places, links, left_out = {}, {}, []
    for raw, place, target in members:
        name = _cleaned(raw)
        if name.startswith("../") or target == "":
            left_out.append(name)
        elif target is not None:
            links[name] = _cleaned(posixpath.join(posixpath.dirname(name), target))
        elif not raw.endswith(("/", "\\")):
            places[name] = place
    every, aliases = sorted({*places, *links}), {}
    for name in links:
        end = _followed(name, links)
        below = every[bisect_left(every, f"{end}/") : bisect_left(every, f"{end}0")]
        if not below or f"{name}/".startswith(f"{end}/"):  # no folder, or one that it lies in
            below = [end]
        aliases |= {name + each[len(end) :]: _followed(each, links) for each in below}
    left_out += sorted(name for name, end in aliases.items() if end not in places)
    places = {name: places[end] for name, end in aliases.items() if end in places} | places
    shown = [name for name in places if not any(map(_is_hidden, _parts(name)))]
    return {name: places[name] for name in shown}, tuple(left_out)


def _followed(name: str, links: dict[str, str], most: int = 40) -> str:
    """Where a path leads within an archive, by as many links as Linux follows."""
    for top in accumulate(_parts(name), posixpath.join):
        if top in links and most:
            return _followed(posixpath.normpath(links[top] + name[len(top) :]), links, most - 1)
    return name


def _cleaned(name: str) -> str:
    """A member's name as it would be in a folder: without the root, "./" and Windows' "\\"."""
    return posixpath.normpath(re.sub(r"^([A-Za-z]:)?/+", "", name.replace("\\", "/")))


def _parts(name: str) -> list[str]:
    return name.split("/")


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part in ("__MACOSX", "@eaDir")  # which holds for ".." too


@contextmanager
def _naming(what: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile's, tarfile's and zlib's errors share no nearer base
        raise Unreadable(what, reason(error)) from None
