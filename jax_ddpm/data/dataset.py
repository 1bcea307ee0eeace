"""An indexed set of images and labels, and what is done to images before they are learned."""

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
    """Height and width that images are brought to. Default: they stay as they are."""
    crop: Literal["center", "random", "none"] = "center"
    """With an image size, the shorter side is resized to it; then the center is cut out, or a
    window that each step draws anew. "none" resizes both sides, whatever their ratio."""
    flip: bool = False
    """Mirror images left to right with probability 1/2, drawn anew in each step."""
    channels: Literal[1, 3, 4] | None = None
    """1 is grey, 3 is RGB, 4 is RGB with opacity. Default: grey if all images are, else RGB, with
    what is transparent on white."""
    range: Literal["unit", "signed"] | None = None
    """What the pixels of a float array lie in: "unit" is [0, 1], "signed" [-1, 1]. Default: [0, 1]
    if none is below 0, which is said; samples that were drawn here say it themselves."""
    labels: Literal["folders", "none"] = "folders"
    """"folders": the labels are the subfolders of pictures, or those that a file brings with it.
    "none": train without labels."""
    skip_unreadable: bool = False
    """Leave out pictures that cannot be read, and count them, instead of ending."""
    max_pixels: int | None = None
    """Read pictures of up to so many pixels. Default: Pillow's limit, 178,956,970."""

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
    """Images, and the class of each, 0 … num_classes - 1, if they have one.

    `data[i]` is an image as it is stored, and its label, or None; `data[:100]`, or an array of
    indices, a smaller `Dataset`. Change a field with `dataclasses.replace`.
    """

    images: Any
    """[image, height, width, channel], uint8, or float32 in [-1, 1]: an array, or what has its
    `shape`, `dtype` and length, and reads rows of it when they are asked for."""
    labels: np.ndarray | None = None
    """int32 [image]."""
    source: str = "arrays"
    """Where they come from, for the record of a run."""
    notes: tuple[str, ...] = ()
    """What a user should know of how they were read."""
    class_names: tuple[str, ...] | None = None
    preparation: Preparation = Preparation()
    """How they were read, and how each step draws from them."""
    extents: np.ndarray | None = None
    """Height and width of what each image holds, int32 [image, 2], if windows are cut out."""
    sha256: str | None = None
    """A digest of the files that the images were decoded from."""

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
        """How many classes, or None."""
        labels = self.labels
        return None if labels is None else max(int(labels.max()) + 1, len(self.class_names or ()))

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
        held = [images.shape[1:3]] * len(rows) if self.extents is None else self.extents[rows]
        pairs = zip(images, (np.asarray(held) - (height, width)) // 2, strict=True)
        return np.stack([image[y : y + height, x : x + width] for image, (y, x) in pairs])

    def check(self) -> None:
        """Raises `FieldError` unless this is what `load_dataset` makes."""
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
        """Their source, shape and dtype, and a SHA-256 of images and labels in hexadecimal."""
        shape, dtype = [len(self), *self.image_shape], str(np.dtype(self.images.dtype))
        return {"source": self.source, "shape": shape, "dtype": dtype, "sha256": self.digest()}

    def digest(self) -> str:
        """Of images and labels: of the files that were read if that is known, or of the numbers."""
        digest = hashlib.sha256((self.sha256 or "").encode())
        if self.sha256 is None:
            block = max(1, 2**24 // math.prod(self.images.shape[1:]))  # row by row is slow
            for row in range(0, len(self), block):
                digest.update(np.ascontiguousarray(self.images[row : row + block]).data)
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
