"""The files of known sets as they were published: MNIST's, and CIFAR's.

To add one: write a function like `read_mnist`, and put it into `FORMATS`. It is given files, and
the name of one of them if that was asked for, and answers None if they are not its own.
"""

import gzip
import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.files import Files

_IDX = re.compile(r"(.*/)?(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_PIXELS = 3 * 32 * 32
_LEFT_OUT = "; those of the test are left out"


def read_mnist(files: Files, chosen: str | None = None) -> Dataset | None:
    """MNIST, Fashion-MNIST and others in idx files: the training images, or those of the test if
    one of its files was chosen or there are no others. Raises `ValueError`."""
    # The names are sorted: one that is not packed comes before its .gz.
    sets: dict[tuple[str, str], dict[str, str]] = {}
    for match in filter(None, map(_IDX.fullmatch, files.names)):
        folder, part, kind, _ = match.groups("")
        sets.setdefault((part, folder), {}).setdefault(kind, match.string)
    if not sets or (chosen and not _IDX.fullmatch(chosen)):
        return None
    parts = {part for (part, _), pair in sets.items() if "images" in pair}
    wanted = chosen.partition("-")[0] if chosen else "train" if "train" in parts else "t10k"
    pairs = [pair for (part, _), pair in sets.items() if part == wanted and len(pair) == 2]
    if len(pairs) != 1:
        got = ", ".join(name for pair in pairs or sets.values() for name in pair.values())
        problem = "one data set" if pairs else "images and labels in one folder"
        raise ValueError(f"expected {problem} in {files.path}, got {got}")
    paths = [pairs[0]["images"], pairs[0]["labels"]]
    pixels, classes = _read(files, paths, _from_idx)
    if pixels.ndim != 3 or classes.shape != pixels.shape[:1] or not len(classes):
        got = f"{paths[0]} {list(pixels.shape)}, {paths[1]} {list(classes.shape)}"
        problem = "expected images [image, height, width] and labels [image]"
        raise ValueError(f"{problem} in {files.path}, got {got}")
    alone = "" if "train" in parts else ": those for training are not there"
    note = f"the images of the test{alone}"
    if wanted == "train":
        note = f"the training images{_LEFT_OUT if 't10k' in parts else ''}"
    return Dataset(pixels[..., None], classes.astype(np.int32), notes=(note,))


def _from_idx(data: bytes) -> np.ndarray:
    """The uint8 array of one file, packed with gzip or not."""
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"expected the magic number 00 00 08, got {data[:3].hex(' ')}")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


class _Cifar(NamedTuple):
    """What the files of a version are called, and the key of the labels in its pickles."""

    num_classes: int
    train: tuple[str, ...]
    test: str
    meta: str
    labels: str | None = None


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARIES = tuple(f"{name}.bin" for name in _BATCHES)
_VERSIONS = (
    _Cifar(10, _BINARIES, "test_batch.bin", "batches.meta.txt"),
    _Cifar(10, _BATCHES, "test_batch", "batches.meta", "labels"),
    _Cifar(100, ("train.bin",), "test.bin", "fine_label_names.txt"),
    _Cifar(100, ("train",), "test", "meta", "fine_labels"),
)


def read_cifar(files: Files, chosen: str | None = None) -> Dataset | None:
    """CIFAR-10 or CIFAR-100, binary or Python's: the training images, or those of the test if its
    file was chosen, with their (fine) labels, and their names if they are there. Raises
    `ValueError`."""
    here, found = set(files.names), []
    for folder in dict.fromkeys(name[: name.rfind("/") + 1] for name in files.names):
        for version in _VERSIONS:  # a file called "train" alone is not yet CIFAR's
            sure = version.num_classes == 10 or folder + version.meta in here
            if sure and folder + version.train[0] in here:
                found.append((folder, version))
    if not found or (chosen and chosen not in {version.test for _, version in found}):
        return None
    if len(found) > 1:
        got = ", ".join(f"{folder}{version.train[0]}" for folder, version in found)
        raise ValueError(f"expected one CIFAR in {files.path}, got {got}")
    folder, version = found[0]
    batches = [folder + name for name in ((version.test,) if chosen else version.train)]
    if missing := [name for name in batches if name not in here]:
        raise ValueError(f"expected {', '.join(missing)} beside the others in {files.path}")
    images, labels = zip(*_read(files, batches, partial(_from_batch, version)), strict=True)
    names = None
    if folder + version.meta in here:
        (names,) = _read(files, [folder + version.meta], partial(_names, version))
    said = f"the training images{_LEFT_OUT if folder + version.test in here else ''}"
    note = f"CIFAR-{version.num_classes}: {'the test images' if chosen else said}"
    pixels = np.concatenate(images).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    classes = np.concatenate(labels).astype(np.int32)
    return Dataset(np.ascontiguousarray(pixels), classes, class_names=names, notes=(note,))


def _from_batch(version: _Cifar, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of a file."""
    if version.labels:
        batch = _unpickled(data)
        pixels, labels = np.asarray(batch["data"]), np.asarray(batch[version.labels])
    else:
        label_bytes = 1 if version.num_classes == 10 else 2  # of which the last is the class
        rows = np.frombuffer(data, np.uint8).reshape(-1, label_bytes + _PIXELS)
        pixels, labels = rows[:, label_bytes:], rows[:, label_bytes - 1]
    kinds = pixels.dtype == np.uint8 and labels.dtype.kind in "iu" and len(pixels)
    if not kinds or pixels.shape != (len(labels), _PIXELS):
        got = f"{pixels.dtype}{list(pixels.shape)} and {labels.dtype}{list(labels.shape)}"
        raise ValueError(f"expected uint8 [image, {_PIXELS}] and whole numbers [image], got {got}")
    if labels.min() < 0 or labels.max() >= version.num_classes:
        expected = f"expected labels from 0 to {version.num_classes - 1}"
        raise ValueError(f"{expected}, got {labels.min()} to {labels.max()}")
    return pixels, labels


def _names(version: _Cifar, data: bytes) -> tuple[str, ...]:
    """What the classes are called."""
    key = (version.labels or "").removesuffix("s") + "_names"
    names = _unpickled(data)[key] if version.labels else data.split()
    if len(names) != version.num_classes:
        raise ValueError(f"expected the names of {version.num_classes} classes, got {len(names)}")
    return tuple(map(_text, names))


def _unpickled(data: bytes) -> dict[str, Any]:
    """The dict of a pickle, whose keys Python 2 wrote as bytes. Nothing that it names is run."""
    content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    return {_text(key): value for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    """Of bytes, texts, numbers, lists, dicts, and NumPy's arrays of uint8."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        # Made for each name anew: a pickle can change a function that it is given.
        def uint8(code: str | bytes, *_: Any) -> np.dtype:
            if code not in ("u1", b"u1"):
                raise pickle.UnpicklingError(f"it has an array of {code}, which is refused")
            return np.dtype(np.uint8)

        def from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> np.ndarray:
            return np.frombuffer(data, np.uint8).reshape(shape, order=order)

        allowed: dict[str, Any] = {
            "__builtin__.bytes": lambda: b"",
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
            "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
            "numpy.core.numeric._frombuffer": from_buffer,
            "numpy.dtype": uint8,
            "numpy.ndarray": None,
        }
        name = f"{module_name}.{global_name}".replace("numpy._core.", "numpy.core.")
        if name not in allowed:
            raise pickle.UnpicklingError(f"it asks for {name}, which is refused")
        return allowed[name]


def _text(text: bytes | str) -> str:
    return text if isinstance(text, str) else str(text, "utf-8", "replace")


def _read(files: Files, names: list[str], parse: Callable[[bytes], Any]) -> list[Any]:
    """What is in each file. Raises `ValueError` naming the one that is damaged."""
    parsed = {}
    for name, read in files.stream(names):
        data = read()
        try:
            parsed[name] = parse(data)
        except Exception as error:  # damage raises nearly anything
            what = f"{name} in {files.path}: {type(error).__name__}"
            raise ValueError(f"cannot read {what}: {error}") from None
    return [parsed[name] for name in names]


FORMATS: tuple[Callable[[Files, str | None], Dataset | None], ...] = (read_mnist, read_cifar)
