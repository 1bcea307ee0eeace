"""The files that MNIST was published in, which Fashion-MNIST and others took over."""

import gzip
import re
import zlib
from collections.abc import Collection

import numpy as np

from jax_ddpm.data.dataset import Dataset
from jax_ddpm.data.files import Files

_NAME = re.compile(r"(.*/)?(train|t10k)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")

_BYTES = 0x08
"""The code of the only numbers that MNIST has."""


def is_idx(names: Collection[str]) -> bool:
    """Whether some of these files are named as MNIST's are, packed with gzip or not."""
    return any(_NAME.fullmatch(name) for name in names)


def read_mnist(files: Files) -> Dataset:
    """The training images, uint8 [image, height, width, 1], or those of the test where there are no
    others, which a note says, and their labels. Raises `ValueError` naming what is missing
    or damaged, and where there are several data sets."""
    # The names are sorted: one that is not packed comes before its .gz.
    found: dict[tuple[str, str], dict[str, str]] = {}
    for match in filter(None, map(_NAME.fullmatch, files.names)):
        folder, part, kind, _ = match.groups("")
        found.setdefault((part, kind), {}).setdefault(folder, match.string)
    part = "train" if ("train", "images") in found else "t10k"
    images, labels = found.get((part, "images"), {}), found.get((part, "labels"), {})
    folders = [folder for folder in images if folder in labels]
    if len(folders) > 1:
        several = ", ".join(images[folder] for folder in folders)
        raise ValueError(f"expected one data set in {files.path}, got {several}")
    if not folders:
        got = ", ".join(name for each in found.values() for name in each.values()) or "none"
        raise ValueError(f"expected images and labels in one folder in {files.path}, got {got}")
    paths = [found[folders[0]] for found in (images, labels)]
    data = files.read_all(paths)
    pixels, classes = (read_idx(data[path], f"{path} in {files.path}") for path in paths)
    for path, array, shape in zip(
        paths, (pixels, classes), ("image, height, width", "image"), strict=True
    ):
        if array.ndim != len(shape.split()) or not array.size:
            problem = f"expected numbers of [{shape}], got {list(array.shape)}"
            raise ValueError(f"{path} in {files.path}: {problem}")
    if len(pixels) != len(classes):
        got = f"got {len(classes)} in {paths[1]}"
        raise ValueError(f"expected {len(pixels)} labels for the images in {paths[0]}, {got}")
    note = "the images of the test: those for training are not there"
    if part == "train":
        has_test = ("t10k", "images") in found
        note = "the training images" + "; those of the test are left out" * has_test
    return Dataset(pixels[..., None], classes.astype(np.int32), notes=(note,))


def read_idx(data: bytes, name: str) -> np.ndarray:
    """The uint8 array of one file, packed with gzip or not. Raises `ValueError` with its `name`."""
    try:
        if data.startswith(b"\x1f\x8b"):
            data = gzip.decompress(data)
        if data[:3] != bytes([0, 0, _BYTES]):
            raise ValueError(f"expected the magic number 00 00 08, got {data[:3].hex(' ')}")
        shape = np.frombuffer(data, ">u4", data[3], 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)
    except (EOFError, IndexError, OSError, ValueError, zlib.error) as error:
        raise ValueError(f"cannot read {name}: {error}") from None
