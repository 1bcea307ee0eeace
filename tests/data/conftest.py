"""Files in folders and archives, and small pictures of every kind that people have."""

import io
import re
import tarfile
import zipfile

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
NO_FILES = {"cats": tarfile.DIRTYPE, "sym.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE}


@pytest.fixture(scope="session")
def write_files():
    """Write files of these names into a folder, a .zip or a .tar, which also gets links."""

    def write(path, files):
        suffix = path.suffix.lower()
        if not suffix:
            for name, data in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(data)
        elif suffix == ".zip":
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                archive.mkdir("cats")
                link = zipfile.ZipInfo("link.png")
                link.create_system, link.external_attr = 3, 0o120777 << 16
                for name, data in {link: b"/etc/passwd", **files}.items():
                    archive.writestr(name, data)
        else:
            with tarfile.open(path, f"w:{re.search('gz|bz2|xz|$', suffix)[0]}") as archive:
                for name, data in {**dict.fromkeys(NO_FILES, b""), **files}.items():
                    member = tarfile.TarInfo(name)
                    member.type = NO_FILES.get(name, tarfile.REGTYPE)
                    member.linkname, member.size = "/etc/passwd", len(data)
                    archive.addfile(member, io.BytesIO(data))
        return path

    return write


def save_picture(rng, mode, path):
    """Noise of any size and one of the modes."""
    shape = rng.integers(9, 71, 2)
    rgba = Image.fromarray(rng.integers(0, 256, (*shape, 4), np.uint8))
    rgb, exif = rgba.convert("RGB"), Image.Exif()
    if mode == "I;16":
        Image.fromarray(rng.integers(0, 2**16, shape, np.uint16)).save(path)
    elif mode == "P":
        rgb.quantize(32).save(path)
    elif mode == "transparent P":
        rgb.quantize(16).save(path, transparency=int(rng.integers(16)))
    elif mode == "two frames":
        rgb.save(path, save_all=True, append_images=[Image.new("RGB", rgb.size, "red")])
    elif mode.startswith("turned"):
        exif[0x0112] = int(mode.split()[1])
        rgb.save(path, exif=exif, quality=95)
    else:
        (rgba if "A" in mode else rgb).convert(mode).save(path)


def write_pictures(folder, of_each):
    """In three subfolders and deeper ones."""
    rng, modes = np.random.default_rng(0), [(end, mode) for end in MODES for mode in MODES[end]]
    for number, (end, mode) in enumerate(modes * of_each):
        place = folder / CLASSES[number % 3] / ("deeper" if number % 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        save_picture(rng, mode, place / f"{number:03} {mode.replace(';', '')}.{end}")
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
