"""An indexed set of images and labels, and the preparation of images."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError, check_between, check_choice, described
from jax_ddpm._typing import AnyArray

Labelling = tuple[np.ndarray | None, tuple[str, ...] | None, tuple[str, ...]]
"""Labels, int32 [image], what the classes are called, and what to say of them."""
_LEVELS = ((np.arange(256) - 127.5) / 127.5).astype(np.float32)  # what each byte means


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """How images are read: decided once, and kept in the run."""

    image_size: int | None = None
    """Height and width that images are resized to, in pixels. Default: they keep their size."""
    crop: Literal["center", "random", "none"] = "center"
    """With an image size, the shorter side is resized to it; then the center is cut out, or a
    random window, drawn anew in each step. "none" resizes both sides, whatever their ratio."""
    flip: bool = False
    """Mirror images left to right with probability 1/2, drawn anew in each step."""
    channels: Literal[1, 3, 4] | None = None
    """1 is grey, 3 is RGB, 4 is RGB with opacity. Default: grey if all images are, else RGB, with
    transparent parts on white."""
    range: Literal["unit", "signed"] | None = None
    """The range of float pixels: "unit" is [0, 1], "signed" [-1, 1]. Default: [0, 1] if none is
    below 0, with a note; files of this library's samples are always "signed"."""
    labels: Literal["folders", "none"] = "folders"
    """"folders": the labels are the subfolders of pictures, or those stored in a file.
    "none": train without labels."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and count them, instead of an error."""
    max_pixels: int | None = None
    """The largest picture that is read, in pixels. Default: Pillow's limit, 178,956,970."""

    def __post_init__(self) -> None:
        for name in ("image_size", "max_pixels"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 1):
                raise FieldError(name, f"expected a whole number above 0, got {count!r}")
        check_choice("crop", self.crop, ("center", "random", "none"))
        check_choice("flip", self.flip, (False, True))
        check_choice("channels", self.channels, (None, 1, 3, 4))
        check_choice("range", self.range, (None, "unit", "signed"))
        check_choice("labels", self.labels, ("folders", "none"))
        check_choice("skip_unreadable", self.skip_unreadable, (False, True))
        if self.crop != "center" and self.image_size is None:
            raise FieldError("crop", "expected an image size with it, got none")

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images, and the class of each, if there are classes.

    `dataset[i]` is one image, as stored, and its label or None; `dataset[:100]`, or an array of
    indices, is a smaller data set. `dataclasses.replace` changes a field.

    Attributes:
      images: [image, height, width, channel], uint8, or float32 in [-1, 1]: an array, or an object
        with its `shape`, `dtype` and length that reads rows on demand.
      labels: int32 [image], 0 … num_classes - 1; None without classes.
      source: the origin of the images, for the record of a run.
      notes: what a user should know of how they were read.
      class_names: the name of each class, or None.
      preparation: how the images were read, and the random windows and flips of a training.
      extents: height and width of each image without its padding, int32 [image, 2], or None.
      sha256: a digest of the files that the images were decoded from, or None.

    Examples:
      >>> pixels, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6, dtype=np.int32) % 2
      >>> pets = data.Dataset(pixels, labels, class_names=("cat", "dog"))
      >>> pets
      Dataset(6 images of 8×8×3, uint8 in 2 classes, from arrays)
      >>> image, label = pets[1]
      >>> image.shape, label, len(pets[:4])
      ((8, 8, 3), 1, 4)
    """

    images: Any
    labels: np.ndarray | None = None
    source: str = "arrays"
    notes: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    preparation: Preparation = Preparation()
    extents: np.ndarray | None = None
    sha256: str | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice) and np.ndim(index) == 0:
            row = range(len(self))[index]
            label = None if self.labels is None else int(self.labels[row])
            return np.asarray(self.images[row]), label
        rows = np.arange(len(self))[index]
        if np.array_equal(rows, np.arange(len(self))):
            return self
        labels = None if self.labels is None else self.labels[rows]
        extents = None if self.extents is None else self.extents[rows]
        # Pictures that are decoded when they are needed stay so, and arrays where they are.
        some = getattr(self.images, "some", self.images.__getitem__)
        images = some(index if isinstance(index, slice) else rows)
        known = f"{self.sha256} {rows.tolist()}"
        sha256 = self.sha256 and hashlib.sha256(known.encode()).hexdigest()
        return replace(self, images=images, labels=labels, extents=extents, sha256=sha256)

    def __repr__(self) -> str:
        shape, dtype = "×".join(map(str, self.image_shape)), np.dtype(self.images.dtype)
        classes = f" in {self.num_classes} classes" if self.num_classes else ""
        return f"Dataset({len(self):,} images of {shape}, {dtype}{classes}, from {self.source})"

    @property
    def num_classes(self) -> int | None:
        """The number of classes, or None."""
        labels = self.labels
        return None if labels is None else max(int(labels.max()) + 1, len(self.class_names or ()))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the network's input."""
        height, width, channels = self.images.shape[1:]
        if self.preparation.crop == "random" and self.preparation.image_size is not None:
            height = width = self.preparation.image_size
        return height, width, channels

    def whole(self, rows: np.ndarray) -> np.ndarray:
        """The images at `rows` [row], the center of each where a step cuts out a random window."""
        images = np.asarray(self.images[rows])
        height, width, _ = self.image_shape
        if images.shape[1:3] == (height, width):
            return images
        held = [images.shape[1:3]] * len(rows) if self.extents is None else self.extents[rows]
        pairs = zip(images, (np.asarray(held) - (height, width)) // 2, strict=True)
        return np.stack([image[y : y + height, x : x + width] for image, (y, x) in pairs])

    def check(self) -> None:
        """Raise `FieldError` if a field is of the wrong shape, dtype or range."""
        shape, dtype = np.shape(self.images), getattr(self.images, "dtype", None)
        if dtype not in (np.uint8, np.float32) or len(shape) != 4 or not np.prod(shape):
            expected = "expected uint8 or float32 images [image, height, width, channel]"
            raise FieldError("data", f"{expected}, got {dtype}{list(shape)}")
        if dtype == np.float32:
            check_between("data", self.images, -1, 1)
        if self.labels is not None:
            labels = np.asarray(self.labels)
            if labels.dtype != np.int32 or labels.shape != shape[:1]:
                got = described(labels)
                raise FieldError("data", f"expected int32 labels [{shape[0]}], got {got}")
            low, high = labels.min(), labels.max()
            most = high if self.class_names is None else len(self.class_names) - 1
            if not 0 <= low <= high <= most:
                raise FieldError("data", f"expected labels from 0 to {most}, got {low} to {high}")

    def describe(self) -> dict[str, Any]:
        """The record of a run: `source`, `shape`, `dtype`, and the digest as `sha256`."""
        shape, dtype = [len(self), *self.image_shape], str(np.dtype(self.images.dtype))
        return {"source": self.source, "shape": shape, "dtype": dtype, "sha256": self.digest()}

    def digest(self) -> str:
        """SHA-256 of the labels and the images, or of their files if known, in hexadecimal."""
        digest = hashlib.sha256((self.sha256 or "").encode())
        if self.sha256 is None:
            block = max(1, 2**24 // math.prod(self.images.shape[1:]))  # row by row is slow
            for row in range(0, len(self), block):
                digest.update(np.ascontiguousarray(self.images[row : row + block]).data)
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()


def to_float(images: AnyArray) -> np.ndarray:
    """Images of any shape in [-1, 1]: a byte x becomes (x - 127.5) / 127.5; floats are unchanged.

    Examples:
      >>> data.to_float(np.array([0, 255], np.uint8))
      array([-1.,  1.], dtype=float32)
    """
    images = np.asarray(images)
    return _LEVELS[images] if images.dtype == np.uint8 else images


def to_bytes(images: AnyArray) -> np.ndarray:
    """Images of any shape as uint8: [-1, 1] becomes 0 … 255, rounded; bytes are unchanged.

    Raises:
      FieldError: another dtype, NaN or infinity.

    Examples:
      >>> data.to_bytes(np.array([-1.0, 0.25, 2.0]))
      array([  0, 159, 255], dtype=uint8)
    """
    images = np.asarray(images)
    if images.dtype == np.uint8:
        return images
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise FieldError("images", f"expected uint8, or floats in [-1, 1], got {images.dtype}")
    if not np.isfinite(images).all():
        raise FieldError("images", "expected finite pixels, got NaN or infinity")
    return np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8)


def numbered(of_each: Sequence[str], by: str) -> Labelling:
    """The labels of images whose classes are called so; numbers are in their order."""
    names = sorted(set(of_each))
    if all(map(str.isdecimal, names)):
        names.sort(key=int)
    label_of = {name: label for label, name in enumerate(names)}
    said = f"classes by {by}: " + ", ".join(f"{label_of[name]} {name}" for name in names[:20])
    said += ", …" * (len(names) > 20)
    if any(name.isdecimal() and int(name) != label for name, label in label_of.items()):
        said += "; their numbers are not those in their names"
    return np.asarray([label_of[name] for name in of_each], np.int32), tuple(names), (said,)
