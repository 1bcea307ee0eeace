"""Files in folders and archives, and small pictures of every kind that people have."""

import io
import re
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

MODES = {
    "png": ("L", "RGB", "RGBA", "LA", "P", "transparent P", "1", "I;16"),
    "jpg": ("L", "RGB", "CMYK", *(f"turned {k}" for k in range(1, 9))),
    "webp": ("RGB", "RGBA"),
    "tif": ("L", "RGB", "RGBA", "CMYK", "I;16", "1"),
    "gif": ("L", "P", "transparent P", "two frames"),
    "bmp": ("L", "RGB", "P", "1"),
}


@pytest.fixture(scope="session")
def write_files():
    """Write files into a folder, a .zip or a .tar. A text in place of bytes is where a link leads;
    in a .tar it is a hard one if its name has "hard" in it."""

    def write(path, files):
        suffix = path.suffix.lower()
        if not suffix:
            for name, data in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(data)
        elif suffix == ".zip":
            with zipfile.ZipFile(path, "w") as archive:
                for name, data in files.items():
                    member = zipfile.ZipInfo(name)
                    member.external_attr = 0o120777 << 16 if isinstance(data, str) else 0
                    archive.writestr(member, data, zipfile.ZIP_DEFLATED)
        else:
            with tarfile.open(path, f"w:{re.search('gz|bz2|xz|$', suffix)[0]}") as archive:
                for name, data in files.items():
                    member = tarfile.TarInfo(name)
                    if isinstance(data, str):
                        member.type = tarfile.LNKTYPE if "hard" in name else tarfile.SYMTYPE
                        member.linkname, data = data, b""
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
        return path

    return write


@pytest.fixture(scope="session")
def zoo(tmp_path_factory):
    """A folder of 105 pictures, three of each kind, in three subfolders and deeper ones."""
    folder, rng = tmp_path_factory.mktemp("zoo"), np.random.default_rng(0)
    modes = [(end, mode) for end in MODES for mode in MODES[end]]
    for number, (end, mode) in enumerate(modes * 3):
        place = folder / ("bright", "dark", "striped ones")[number % 3] / ("deeper" * (number % 2))
        place.mkdir(parents=True, exist_ok=True)
        save_picture(rng, mode, place / f"{number:03} {mode.replace(';', '')}.{end}")
    return folder


def save_picture(rng, mode, path):
    """Noise of any size and one of the modes."""
    shape, options, exif = rng.integers(9, 71, 2), {}, Image.Exif()
    picture = Image.fromarray(rng.integers(0, 256, (*shape, 4), np.uint8))
    picture = picture if "A" in mode else picture.convert("RGB")
    if mode == "I;16":
        picture = Image.fromarray(rng.integers(0, 2**16, shape, np.uint16))
    elif mode.endswith("P"):
        picture = picture.quantize(16)
        options = {"transparency": int(rng.integers(16))} if "transparent" in mode else {}
    elif mode == "two frames":
        options = {"save_all": True, "append_images": [Image.new("RGB", picture.size, "red")]}
    elif mode.startswith("turned"):
        exif[0x0112] = int(mode.split()[1])
        options = {"exif": exif, "quality": 95}
    else:
        picture = picture.convert(mode)
    picture.save(path, **options)
