"""CIFAR-10 and CIFAR-100 as published: the binary versions, and the pickles for Python."""

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.files import Files
from jax_ddpm.data.unpickling import safe_loads

_PIXELS = 3 * 32 * 32


class _Version(NamedTuple):
    """What its files are called, and where the labels of its classes are."""

    title: str
    num_classes: int
    train: tuple[str, ...]
    test: str
    meta: str
    marks: tuple[str, ...]
    """The names that tell it from other folders."""
    labels: str = ""
    """The key of the labels in a pickle, and "" for the binary versions."""


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARIES = tuple(f"{name}.bin" for name in _BATCHES)
_FINE = "fine_label_names.txt"

_VERSIONS = (
    _Version("CIFAR-10", 10, _BINARIES, "test_batch.bin", "batches.meta.txt", _BINARIES[:1]),
    _Version("CIFAR-10", 10, _BATCHES, "test_batch", "batches.meta", _BATCHES[:1], "labels"),
    _Version("CIFAR-100", 100, ("train.bin",), "test.bin", _FINE, ("train.bin", _FINE)),
    _Version("CIFAR-100", 100, ("train",), "test", "meta", ("train", "meta"), "fine_labels"),
)


def is_cifar(names: Collection[str]) -> bool:
    """Whether some of these files are named as CIFAR's are."""
    return bool(_find(names))


def is_cifar_test(name: str) -> bool:
    """Whether a file is named as the test images of a CIFAR are."""
    return name in {version.test for version in _VERSIONS}


def read_cifar(files: Files, *, test: bool = False) -> Dataset:
    """The training images, or those of the test, uint8 [image, 32, 32, 3], their labels, and the
    names of the classes, if they are there.

    CIFAR-100's labels are the fine ones. Pickles run nothing. Raises `ValueError` naming what is
    missing or damaged, and where there are several data sets.
    """
    found = _find(files.names)
    if len(found) != 1:
        got = ", ".join(f"{folder}{version.train[0]}" for folder, version in found) or "none"
        raise ValueError(f"expected one CIFAR in {files.path}, got {got}")
    folder, version = found[0]
    here = set(files.names)
    batches = (version.test,) if test else version.train
    if missing := [name for name in batches if folder + name not in here]:
        raise ValueError(f"expected {', '.join(missing)} beside the others in {files.path}")
    wanted = here.intersection(folder + name for name in (*batches, version.meta))
    data = files.read_all(wanted)
    pixels, labels = [], []
    for name in batches:
        where = f"{folder}{name} in {files.path}"
        read = _read_pickle if version.labels else _read_binary
        batch_pixels, batch_labels = read(data[folder + name], version, where)
        if batch_labels.min() < 0 or batch_labels.max() >= version.num_classes:
            got = f"{batch_labels.min()} to {batch_labels.max()}"
            expected = f"expected labels from 0 to {version.num_classes - 1}"
            raise ValueError(f"{where}: {expected}, got {got}")
        pixels.append(batch_pixels)
        labels.append(batch_labels.astype(np.int32))
    images = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    names = None
    if folder + version.meta in data:
        names = _read_names(data[folder + version.meta], version, f"{folder}{version.meta}")
    note = f"{version.title}: the test images"
    if not test:
        rest = "; those of the test are left out" * (folder + version.test in here)
        note = f"{version.title}: the training images{rest}"
    return Dataset(
        np.ascontiguousarray(images), np.concatenate(labels), notes=(note,), class_names=names
    )


def _find(names: Collection[str]) -> list[tuple[str, _Version]]:
    """The folders, "" or such as "a/b/", and what lies in each."""
    folders: dict[str, set[str]] = {}
    for name in names:
        folder, slash, base = name.rpartition("/")
        folders.setdefault(folder + slash, set()).add(base)
    return [
        (folder, version)
        for folder, bases in folders.items()
        for version in _VERSIONS
        if bases.issuperset(version.marks)
    ]


def _read_binary(data: bytes, version: _Version, where: str) -> tuple[np.ndarray, np.ndarray]:
    label_bytes = 1 if version.num_classes == 10 else 2  # of which the last is the class
    record = label_bytes + _PIXELS
    if not data or len(data) % record:
        raise ValueError(f"{where}: expected records of {record} bytes, got {len(data)} bytes")
    rows = np.frombuffer(data, np.uint8).reshape(-1, record)
    return rows[:, -_PIXELS:], rows[:, label_bytes - 1]


def _read_pickle(data: bytes, version: _Version, where: str) -> tuple[np.ndarray, np.ndarray]:
    batch = _unpickle(data, where)
    pixels: Any = batch.get("data")
    labels = batch.get(version.labels)
    got, shape = _described(pixels), np.shape(pixels)
    if not got.startswith("uint8") or shape[1:] != (_PIXELS,) or not shape[0]:
        raise ValueError(f"{where}: expected data as uint8 [image, {_PIXELS}], got {got}")
    if not isinstance(labels, list) or [*map(type, labels)] != [int] * len(pixels):
        expected = f"expected {version.labels} as {len(pixels)} whole numbers"
        raise ValueError(f"{where}: {expected}, got {_described(labels)}")
    return pixels, np.asarray(labels)


def _read_names(data: bytes, version: _Version, where: str) -> tuple[str, ...]:
    names: Any = data.split()
    if version.labels:
        names = _unpickle(data, where).get(version.labels[:-1] + "_names")
    is_text = isinstance(names, list) and all(isinstance(name, bytes | str) for name in names)
    if not is_text or len(names) != version.num_classes:
        expected = f"expected the names of {version.num_classes} classes as text"
        raise ValueError(f"{where}: {expected}, got {_described(names)}")
    return tuple(map(_to_text, names))


def _unpickle(data: bytes, where: str) -> dict[str, Any]:
    """A dict with text for its keys, which Python 2 wrote as bytes."""
    try:
        value = safe_loads(data)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if not isinstance(value, dict) or not all(isinstance(key, bytes | str) for key in value):
        raise ValueError(f"{where}: expected a dict, got {_described(value)}")
    return {_to_text(key): each for key, each in value.items()}


def _to_text(text: bytes | str) -> str:
    return text.decode("utf-8", "replace") if isinstance(text, bytes) else text


def _described(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    many = f" of {len(value)}" if isinstance(value, list) else ""
    return "nothing" if value is None else f"a {type(value).__name__}{many}"
