"""Images for training, as float32 [image, height, width, channel] in [-1, 1]."""

from pathlib import Path

import numpy as np

from jax_ddpm.cli.config import UsageError

__all__ = ["load_images"]

_PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def load_images(path: Path | None) -> np.ndarray:
    """The images at `path`, or scikit-learn's 1,797 real digits, 8×8, where None."""
    if path is None:
        from sklearn.datasets import load_digits

        pixels, _ = load_digits(return_X_y=True)
        return (np.reshape(pixels, (-1, 8, 8, 1)) / 8 - 1).astype(np.float32)
    if not path.exists():
        raise UsageError(f"--data: no such file or folder: {path}")
    if path.is_dir():
        return _to_signed(_read_folder(path), path)
    if path.suffix in (".npy", ".npz"):
        return _to_signed(_read_array(path), path)
    raise UsageError(f"--data: expected a .npz, a .npy or a folder of pictures, got {path}")


def _read_array(path: Path) -> np.ndarray:
    try:
        loaded = np.load(path, allow_pickle=False)
        if not isinstance(loaded, np.lib.npyio.NpzFile):
            return loaded
        candidates = [name for name in loaded.files if loaded[name].ndim in (3, 4)]
        if len(candidates) == 1:
            return loaded[candidates[0]]
        names = ", ".join(loaded.files)
    except Exception as error:  # NumPy's, zipfile's and zlib's errors share no nearer base
        raise UsageError(f"--data: cannot read {path}: {_line(error)}") from None
    raise UsageError(f"--data: expected one array of images in {path}, got the arrays {names}")


def _read_folder(path: Path) -> np.ndarray:
    from PIL import Image

    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _PICTURES)
    if not files:
        raise UsageError(f"--data: no pictures in {path}")
    pictures = []
    for file in files:
        try:
            with Image.open(file) as picture:
                if picture.mode[0] in "IF":
                    raise ValueError(f"expected 8 bits a channel, got mode {picture.mode}")
                grey = picture.mode in ("1", "L", "LA")
                pictures.append(np.asarray(picture.convert("L" if grey else "RGB")))
        except (OSError, ValueError, SyntaxError) as error:
            raise UsageError(f"--data: cannot read {file}: {_line(error)}") from None
        if pictures[-1].shape != pictures[0].shape:
            raise UsageError(
                f"--data: expected pictures of one size and mode: {files[0].name} has shape "
                f"{pictures[0].shape}, {file.name} has {pictures[-1].shape}"
            )
    return np.stack(pictures)


def _to_signed(images: np.ndarray, path: Path) -> np.ndarray:
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.size == 0:
        raise UsageError(
            "--data: expected images of shape [image, height, width(, channel)], "
            f"got {images.shape} in {path}"
        )
    if images.shape[-1] > 4:
        raise UsageError(
            f"--data: expected the channels last, 1 to 4 of them, got {images.shape} in {path}"
        )
    if images.dtype == np.uint8:
        return (images / 127.5 - 1).astype(np.float32)
    if not np.issubdtype(images.dtype, np.floating):
        raise UsageError(f"--data: expected uint8 or float images, got {images.dtype} in {path}")
    if not np.all(np.isfinite(images)):
        raise UsageError(f"--data: expected finite pixels, got NaN or infinity in {path}")
    low, high = float(images.min()), float(images.max())
    if 0 <= low and high <= 1:
        return (images * 2 - 1).astype(np.float32)
    if -1 <= low and high <= 1:
        return images.astype(np.float32)
    raise UsageError(
        f"--data: expected float pixels in [0, 1] or [-1, 1], got [{low:g}, {high:g}] in {path}"
    )


def _line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
