"""Small pictures of every kind that people have."""

import numpy as np
import pytest
from PIL import Image

CLASSES = ("bright", "dark", "striped ones")
MODES = {
    "png": ("L", "RGB", "RGBA", "LA", "P", "transparent P", "1", "I;16"),
    "jpg": ("L", "RGB", "CMYK", *(f"turned {k}" for k in range(1, 9))),
    "webp": ("RGB", "RGBA"),
    "tif": ("L", "RGB", "RGBA", "CMYK", "I;16", "1"),
    "gif": ("L", "P", "transparent P", "two frames"),
    "bmp": ("L", "RGB", "P", "1"),
}


def make_picture(rng, mode, size):
    """A smooth picture with an edge in it, and what `save` needs beside it."""
    width, height = size
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    planes = [x, y, 1 - x, (x - 0.5) ** 2 + y**2]
    levels = np.stack(planes, axis=-1) * rng.uniform(100, 255) * (1 - 0.5 * (x > 0.6)[..., None])
    rgba, options = levels.clip(0, 255).astype(np.uint8), {}
    if mode == "I;16":
        return Image.fromarray((levels[..., 0] * 257).clip(0, 65535).astype(np.uint16)), options
    rgb = Image.fromarray(rgba[..., :3])
    if mode == "RGBA":
        return Image.fromarray(rgba), options
    if mode.startswith("turned"):
        exif = Image.Exif()
        exif[0x0112] = int(mode.split()[1])
        return rgb, {"exif": exif, "quality": 95}
    if mode == "transparent P":
        return rgb.quantize(16), {"transparency": int(rng.integers(16))}
    if mode == "two frames":
        return rgb, {"save_all": True, "append_images": [Image.new("RGB", size, "red")]}
    if mode == "LA":
        return Image.fromarray(rgba[..., [0, 3]]), options
    return (rgb.quantize(32) if mode == "P" else rgb.convert(mode)), options


def write_pictures(folder, of_each):
    """In three subfolders and deeper ones."""
    rng, number = np.random.default_rng(0), 0
    for name in CLASSES:
        (folder / name / "deeper").mkdir(parents=True)
    for _ in range(of_each):
        for kind, modes in MODES.items():
            for mode in modes:
                size = tuple(map(int, rng.integers(9, 41, 2)))
                picture, options = make_picture(rng, mode, size)
                place = folder / CLASSES[number % 3] / ("deeper" if number % 2 else "")
                picture.save(place / f"{number:03} {mode.replace(';', '')}.{kind}", **options)
                number += 1
    (folder / "bright" / ".hidden.png").write_bytes(b"not a picture")
    (folder / "bright" / "notes.txt").write_text("not a picture")
    return folder


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """A folder of 35 pictures, one of each kind."""
    return write_pictures(tmp_path_factory.mktemp("few"), 1)


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A folder of 315 pictures, nine of each kind."""
    return write_pictures(tmp_path_factory.mktemp("zoo"), 9)
