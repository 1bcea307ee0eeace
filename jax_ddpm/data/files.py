"""Named files with one meaning, wherever they lie: in a folder, a zip or a tar."""

import io
import os
import stat
import tarfile
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

__all__ = ["ARCHIVES", "Files", "Unreadable", "open_beside", "open_files"]

_TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")

ARCHIVES = (".zip", *_TARS)
"""How the names of archives end, in any case."""


class Unreadable(ValueError):
    """Says what cannot be read; `reason` says why, without the name."""

    def __init__(self, what: object, reason: str) -> None:
        super().__init__(f"cannot read {what}: {reason}")
        self.reason = reason


class Files:
    """Files by their names in `path`, without the hidden ones and those of `__MACOSX`.

    `names` are relative, such as "cats/1.png", and in the order of their parts.
    """

    def __init__(self, path: Path, places: dict[str, Any]) -> None:
        self.path = path
        self.names = tuple(sorted(places, key=_parts))
        self._places = places

    def read(self, name: str) -> bytes:
        """One file; several threads may read at once. Raises `ValueError` naming what cannot be."""
        place = self._place(name)
        with _naming(f"{name} in {self.path}"):
            return self._read(name, place)

    def read_all(self, names: Collection[str]) -> dict[str, bytes]:
        """Those of `names`. Raises as `read` does."""
        found = {}
        for name, data in self.stream(names):
            if isinstance(data, ValueError):
                raise data
            found[name] = data
        return found

    def stream(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, bytes | ValueError]]:
        """Each file, or each of `names`, once, with its name, in the order that is fastest; in
        place of one that cannot be read, what `read` raises. Raises `ValueError` where nothing
        after it can be read."""
        for name in self._ordered(self.names if names is None else set(names)):
            try:
                data = self.read(name)
            except ValueError as error:
                data = error
            yield name, data

    def _place(self, name: str) -> Any:
        if name not in self._places:
            raise ValueError(f"no file {name} in {self.path}")
        return self._places[name]

    def _read(self, name: str, place: Any) -> bytes:
        raise NotImplementedError

    def _ordered(self, names: Collection[str]) -> list[str]:
        return sorted(names, key=self._place)


def open_files(path: str | os.PathLike[str]) -> Files:
    """The files of a folder, with those below it and behind links, or of a .zip or a .tar.

    A tar may be compressed with gzip, bzip2 or xz: it is then read from beginning to end, by
    `stream`, and `read` refuses. Of an archive's members, links and what would lie outside are left
    out. Raises `ValueError` naming what is missing, damaged or of another kind.
    """
    path = Path(path)
    name = path.name.lower()
    if not path.exists():
        raise ValueError(f"no such file or folder: {path}")
    if path.is_dir():
        return _Folder(path)
    if name.endswith(".zip"):
        return _Zip(path)
    if name.endswith(_TARS):
        return _Tar(path)
    raise ValueError(f"expected a folder or a file {', '.join(ARCHIVES)}, got {path}")


def open_beside(path: Path) -> Files:
    """The files in the folder that a file lies in, without those of its subfolders."""
    return _Folder(path.parent, deep=False)


class _Folder(Files):
    def __init__(self, path: Path, *, deep: bool = True) -> None:
        try:
            names = sorted(_walk(str(path), deep), key=_parts)
        except OSError as error:
            raise Unreadable(error.filename or path, error.strerror or str(error)) from None
        super().__init__(path, {name: number for number, name in enumerate(names)})

    def _read(self, name: str, place: Any) -> bytes:
        return (self.path / name).read_bytes()


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
        self._lock = Lock()
        self._infos = {
            name: info
            for info in self._zip.infolist()
            if not info.is_dir() and not stat.S_ISLNK(info.external_attr >> 16)
            if (name := _cleaned(info.filename)) is not None
        }
        super().__init__(path, {name: info.header_offset for name, info in self._infos.items()})

    def _read(self, name: str, place: Any) -> bytes:
        with self._lock:
            return self._zip.read(self._infos[name])


class _Tar(Files):
    """The places are (offset, size) in the unpacked archive."""

    def __init__(self, path: Path) -> None:
        places = {}
        with _naming(path), tarfile.open(path) as tar:
            file: Any = tar.fileobj
            self._is_plain = isinstance(file, io.BufferedReader)
            for name, member in _members(tar):
                if member.issparse():
                    raise ValueError(f"{name} is sparse; unpack the archive")
                places[name] = member.offset_data, member.size  # the last of a name counts
            # tarfile takes a damaged header for the end.
            file.seek(tar.offset)
            if file.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise ValueError(f"expected a header at byte {tar.offset}")
            while not self._is_plain and file.read(2**20):
                pass  # to the checksum behind the end
        super().__init__(path, places)

    def read(self, name: str) -> bytes:
        if not self._is_plain:
            problem = f"cannot read single files of {self.path}, which is compressed: unpack it"
            raise ValueError(problem)
        return super().read(name)

    def stream(
        self, names: Collection[str] | None = None
    ) -> Iterator[tuple[str, bytes | ValueError]]:
        if self._is_plain:
            yield from super().stream(names)
            return
        wanted = set(self._ordered(self.names if names is None else names))
        with _naming(self.path), tarfile.open(self.path) as tar:
            members = _members(tar)
            while wanted:
                name, member = next(members)
                if name in wanted and member.offset_data == self._places[name][0]:
                    wanted.remove(name)
                    file = tar.extractfile(member)
                    assert file is not None  # it is a regular one
                    yield name, file.read()

    def _read(self, name: str, place: Any) -> bytes:
        offset, size = place
        with self.path.open("rb") as file:  # each its own: threads do not wait for one another
            file.seek(offset)
            data = file.read(size)
        if len(data) != size:
            raise ValueError(f"expected {size} bytes, got {len(data)}")
        return data


def _members(tar: Any) -> Iterator[tuple[str, tarfile.TarInfo]]:
    while (member := tar.next()) is not None:
        tar.members.clear()  # or it keeps a kilobyte for each
        if member.isreg() and (name := _cleaned(member.name)) is not None:
            yield name, member


def _cleaned(name: str) -> str | None:
    """A member's name without "./", or None for one that is hidden or would lie outside."""
    parts = [part for part in _parts(name) if part not in ("", ".")]
    if not parts or name.startswith("/") or any(map(_is_hidden, parts)):
        return None
    return "/".join(parts)


def _parts(name: str) -> list[str]:
    return name.split("/")


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"  # which holds for ".." too


@contextmanager
def _naming(what: object) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # zipfile's, tarfile's and zlib's errors share no nearer base
        reason = (isinstance(error, OSError) and error.strerror) or str(error).partition("\n")[0]
        raise Unreadable(what, reason or type(error).__name__) from None
