"""The files of known sets as they were published: MNIST's, and CIFAR's.

To add one: a function like `read_mnist`, in `FORMATS`. It is given all files, and the name of the
one that was `chosen`, if any. It takes the training part and notes what it leaves out, or returns
None where its files are not there.
"""

import gzip
import io
import pickle
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError, described
from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.files import Files

_IDX = re.compile(r"(.*/)?(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_TRAIN, _TEST = "the training images", "the test images"


def read_mnist(files: Files, chosen: str | None = None) -> Dataset | None:
    """MNIST, Fashion-MNIST and others in idx files: the training images, or those of the test if
    one of its files was chosen or there are no others. Raises `FieldError`."""
    # The names are sorted: one that is not packed comes before its .gz.
    sets: dict[tuple[str, str], dict[str, str]] = {}
    for match in filter(None, map(_IDX.fullmatch, files.names)):
        folder, part, kind, _ = match.groups("")
        sets.setdefault((part, folder), {}).setdefault(kind, match.string)
    if not sets or (chosen and not _IDX.fullmatch(chosen)):
        return None
    wanted = "train" if "train" in {part for part, _ in sets} else "t10k"
    wanted = chosen.partition("-")[0] if chosen else wanted
    pairs = [pair for (part, _), pair in sets.items() if part == wanted and len(pair) == 2]
    if len(pairs) != 1:
        got = ", ".join(name for pair in pairs or sets.values() for name in pair.values())
        problem = f"expected images and labels in one folder of {files.path}, got {got}"
        raise FieldError("data", problem)
    names = pairs[0]["images"], pairs[0]["labels"]
    pixels, labels = _read(files, dict.fromkeys(names, _from_idx))
    note = _TRAIN if wanted == "train" else _TEST
    return Dataset(pixels[..., None], labels.astype(np.int32), notes=(note,))


def _from_idx(data: bytes) -> np.ndarray:
    """The uint8 array of one file, packed with gzip or not."""
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    if data[:3] != b"\0\0\x08":
        raise ValueError(f"expected the magic number 00 00 08, got {data[:3].hex(' ')}")
    shape = np.frombuffer(data, ">u4", data[3], 4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


class _Cifar(NamedTuple):
    """The files of a version."""

    title: str
    num_labels: int  # in each row of a binary file, before the pixels; the last is the class
    train: tuple[str, ...]
    test: str
    meta: str
    keys: tuple[str, str] | None = None  # what a pickle calls labels and names


_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
_BINARIES = tuple(f"{name}.bin" for name in _BATCHES)
_VERSIONS = (
    _Cifar("CIFAR-10", 1, _BINARIES, "test_batch.bin", "batches.meta.txt"),
    _Cifar("CIFAR-10", 1, _BATCHES, "test_batch", "batches.meta", ("labels", "label_names")),
    _Cifar("CIFAR-100", 2, ("train.bin",), "test.bin", "fine_label_names.txt"),
    _Cifar("CIFAR-100", 2, ("train",), "test", "meta", ("fine_labels", "fine_label_names")),
)


def read_cifar(files: Files, chosen: str | None = None) -> Dataset | None:
    """CIFAR-10 or CIFAR-100, binary or Python's: the training images, or those of the test if its
    file was chosen, with their (fine) labels and the names of those. Raises `FieldError`."""
    here = set(files.names)
    found = [
        (folder, version)
        for folder in dict.fromkeys(name[: name.rfind("/") + 1] for name in files.names)
        for version in _VERSIONS
        if folder + version.train[0] in here
        # A file called "train" alone is not yet CIFAR's.
        and (version.title == "CIFAR-10" or folder + version.meta in here)
    ]
    if not found or (chosen and chosen not in [version.test for _, version in found]):
        return None
    if len(found) > 1:
        got = ", ".join(f"{folder}{version.train[0]}" for folder, version in found)
        raise FieldError("data", f"expected one CIFAR in {files.path}, got {got}")
    ((folder, version),) = found
    batches = [folder + name for name in ((version.test,) if chosen else version.train)]
    parse_of: dict[str, Any] = dict.fromkeys(batches, partial(_from_batch, version))
    parse_of[folder + version.meta] = partial(_names, version)
    if missing := parse_of.keys() - here:
        expected = f"expected {', '.join(sorted(missing))} beside the others"
        raise FieldError("data", f"{expected} in {files.path}")
    *parts, names = _read(files, parse_of)
    images, labels = map(np.concatenate, zip(*parts, strict=True))
    pixels = np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    note = f"{version.title}: {_TEST if chosen else _TRAIN}"
    return Dataset(pixels, labels, class_names=names, notes=(note,))


def _from_batch(version: _Cifar, data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Pixels and labels of a file."""
    if version.keys:
        batch = _unpickled(data)
        pixels, labels = np.asarray(batch["data"]), np.asarray(batch[version.keys[0]])
    else:
        rows = np.frombuffer(data, np.uint8).reshape(-1, version.num_labels + 3 * 32 * 32)
        pixels, labels = rows[:, version.num_labels :], rows[:, version.num_labels - 1]
    is_whole = pixels.dtype == np.uint8 and labels.dtype.kind in "iu"
    if not is_whole or pixels.shape != (*labels.shape, 3 * 32 * 32):
        got = f"{described(pixels)} and {described(labels)}"
        raise ValueError(f"expected uint8 [image, 3072] and integer labels [image], got {got}")
    return pixels, np.asarray(labels.tolist(), np.int32)


def _names(version: _Cifar, data: bytes) -> tuple[str, ...]:
    """What the classes are called."""
    names = _unpickled(data)[version.keys[1]] if version.keys else data.split()
    return tuple(map(_text, names))


def _unpickled(data: bytes) -> dict[str, Any]:
    """The dict of a pickle, whose keys Python 2 wrote as bytes."""
    content = _Unpickler(io.BytesIO(data), encoding="bytes").load()
    return {_text(key): value for key, value in content.items()}


class _Unpickler(pickle.Unpickler):
    """Of bytes, texts, numbers, lists, dicts, and NumPy's arrays of uint8."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        # Stand-ins, made anew: a pickle can change a function that it is given, and crash Python
        # by the state of a real `numpy.dtype`.
        def uint8(code: Any, *_: Any) -> np.dtype:
            if code not in ("u1", b"u1"):
                raise pickle.UnpicklingError(f"it has an array of {code}, which is refused")
            return np.dtype(np.uint8)

        allowed: dict[str, Any] = {
            "__builtin__.bytes": lambda: b"",
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
            "numpy.core.multiarray._reconstruct": lambda *_: np.empty(0, np.uint8),
            "numpy.core.numeric._frombuffer": lambda data, dtype, shape, order, *_: np.reshape(
                np.frombuffer(data, np.uint8), shape, order
            ),
            "numpy.dtype": uint8,
            "numpy.ndarray": None,
        }
        name = f"{module_name}.{global_name}".replace("numpy._core.", "numpy.core.")
        if name not in allowed:
            raise pickle.UnpicklingError(f"it asks for {name}, which is refused")
        return allowed[name]


def _text(text: bytes | str) -> str:
    return text if isinstance(text, str) else str(text, "utf-8", "replace")


def _read(files: Files, parse_of: dict[str, Callable[[bytes], Any]]) -> list[Any]:
    """What is in each file. Raises `FieldError` naming the one that is damaged."""
    parsed = {}
    for name, read in files.stream(parse_of):
        data = read()
        try:
            parsed[name] = parse_of[name](data)
        except Exception as error:  # damage raises nearly anything
            what = f"{name} in {files.path}: {type(error).__name__}: {error}"
            raise FieldError("data", f"cannot read {what}") from None
    return [parsed[name] for name in parse_of]


FORMATS: tuple[Callable[[Files, str | None], Dataset | None], ...] = (read_mnist, read_cifar)
