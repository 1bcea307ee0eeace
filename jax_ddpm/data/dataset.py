"""An indexed set of images, whose rows are read when they are needed, and their labels."""

import hashlib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm._typing import AnyArray
from jax_ddpm.data.preparation import Preparation

_LEVELS = ((np.arange(256) - 127.5) / 127.5).astype(np.float32)
"""What each byte means."""
_BLOCK = 2**24
_SPLIT = re.compile(
    r"(?<![a-z])[xy]?(train|trn|val|test|tst|dev|eval|pred|hold[-_ ]?out|unlabell?ed|extra|query"
    r"|crossval|(?<=[a-z]_)t[rs])(ing|id|idate|idation|idierung|uation|iction|val)?"
    r"(s?daten|set|data)?[abxy]?(?![a-z])"
)


class Dataset(NamedTuple):
    """Images, and the class of each, 0 … num_classes - 1, if they have one."""

    images: Any
    """[image, height, width, channel], uint8, or float32 in [-1, 1]: an array, or what has its
    `shape`, `dtype` and length, and reads rows of it when they are asked for."""
    labels: np.ndarray | None = None
    """int32 [image]."""
    source: str = "arrays"
    """Where they come from, for the record of a run."""
    notes: tuple[str, ...] = ()
    """What was decided in reading them, and what a user should know."""
    class_names: tuple[str, ...] | None = None
    """What each class is called, if it is known."""
    preparation: Preparation = Preparation()
    """How they were read, and how each step draws from them."""
    extents: np.ndarray | None = None
    """Height and width of what each image holds, int32 [image, 2], where they differ and random
    windows are cut out."""
    sha256: str | None = None
    """A digest of the files that the images were decoded from."""

    @property
    def num_classes(self) -> int | None:
        """How many classes, or None."""
        if self.labels is None:
            return None
        return max(int(self.labels.max()) + 1, len(self.class_names or ()))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels as a network sees them."""
        height, width, channels = self.images.shape[1:]
        if self.preparation.crop == "random" and self.preparation.image_size is not None:
            height = width = self.preparation.image_size
        return height, width, channels

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """Images of `image_shape`: the center of those that windows are cut out of."""
        images = np.asarray(self.images[rows])
        height, width, _ = self.image_shape
        if images.shape[1:3] == (height, width):
            return images
        extents = np.resize(images.shape[1:3], (len(rows), 2))
        extents = extents if self.extents is None else self.extents[rows]
        corners = (extents - (height, width)) // 2
        windows = [
            image[top : top + height, left : left + width]
            for image, (top, left) in zip(images, corners, strict=True)
        ]
        return np.stack(windows)

    def check(self) -> None:
        """Raises `FieldError` unless this is what `load_dataset` makes: uint8 images, or float32 in
        [-1, 1], and int32 labels from 0."""
        shape, dtype = np.shape(self.images), getattr(self.images, "dtype", None)
        if dtype not in (np.uint8, np.float32) or len(shape) != 4 or not np.prod(shape):
            problem = "expected uint8 or float32 images [image, height, width, channel]"
            raise FieldError("data", f"{problem}, got {dtype}{list(shape)}")
        if dtype == np.float32:
            images = np.asarray(self.images)
            check_finite(images, "the data")
            if np.max(np.abs(images)) > 1:
                problem = f"expected pixels in [-1, 1], got [{images.min():g}, {images.max():g}]"
                raise FieldError("data", problem)
        if self.labels is None:
            return
        labels = np.asarray(self.labels)
        if labels.dtype != np.int32 or labels.shape != shape[:1]:
            problem = f"expected int32 labels [{shape[0]}], one for each image"
            raise FieldError("data", f"{problem}, got {labels.dtype}{list(labels.shape)}")
        if labels.min() < 0:
            raise FieldError("data", f"expected labels from 0, got {labels.min()}")
        if self.class_names is not None and len(self.class_names) <= labels.max():
            problem = f"expected a name for each of {labels.max() + 1} classes"
            raise FieldError("data", f"{problem}, got {len(self.class_names)}")

    def describe(self) -> dict[str, Any]:
        """Their source, shape and dtype, and a SHA-256 of images and labels in hexadecimal."""
        shape = [len(self.images), *self.image_shape]
        dtype = str(np.dtype(self.images.dtype))
        return {"source": self.source, "shape": shape, "dtype": dtype, "sha256": self.digest()}

    def digest(self) -> str:
        """Of images and labels: of the files that were read if that is known, or of the numbers."""
        digest = hashlib.sha256((self.sha256 or "").encode())
        if self.sha256 is None:
            row = int(np.prod(self.images.shape[1:])) * np.dtype(self.images.dtype).itemsize
            rows = max(1, _BLOCK // row)
            for first in range(0, len(self.images), rows):
                digest.update(np.ascontiguousarray(self.images[first : first + rows]).data)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


def to_float(images: AnyArray) -> np.ndarray:
    """Bytes as float32 in [-1, 1], (x - 127.5) / 127.5; floats as they are."""
    images = np.asarray(images)
    return _LEVELS[images] if images.dtype == np.uint8 else images


def to_bytes(images: AnyArray) -> np.ndarray:
    """Images as uint8: of [-1, 1], rounded; bytes as they are. Raises `FieldError` of a NaN."""
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise FieldError("images", f"expected uint8, or floats in [-1, 1], got {images.dtype}")
    if not np.isfinite(images).all():
        raise FieldError("images", "expected finite pixels, got NaN or infinity")
    return np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8)


def split_of(name: str) -> str | None:
    """Which part of a set a name tells, "train" or another; None if it tells none."""
    found = _SPLIT.search(re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())
    return found and ("train" if found[1].startswith("tr") else found[1])


def numbered(of_each: Sequence[str], by: str) -> tuple[np.ndarray, tuple[str, ...], str]:
    """Labels int32 for the names of classes; each class's name, numbers in their order; and a line
    that says so."""
    names = sorted(set(of_each))
    if all(map(str.isdecimal, names)):
        names.sort(key=int)
    label_of = {name: label for label, name in enumerate(names)}
    said = f"classes by {by}: " + ", ".join(f"{label_of[name]} {name}" for name in names[:20])
    said += ", …" * (len(names) > 20)
    if any(name.isdecimal() and int(name) != label for name, label in label_of.items()):
        said += "; their numbers are not those in their names"
    return np.asarray([label_of[name] for name in of_each], np.int32), tuple(names), said


def check_finite(images: np.ndarray, where: str) -> None:
    """Raises `FieldError` unless every pixel is a number."""
    if len(wrong := np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))):
        problem = f"expected finite pixels, got NaN or infinity in {len(wrong)} of the "
        rest = f"{len(images)} images in {where}, the first of them image {wrong[0]}"
        raise FieldError("data", problem + rest)
