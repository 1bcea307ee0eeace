"""The pictures: grids, strips of the forward process, the reverse process as a GIF, the loss.

Images come in as [image, height, width, channel], float in [-1, 1] or uint8; one or three channels
are grey or RGB, and two or four these with their opacity, which grids draw on white.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jax_ddpm._errors import FieldError, check_positive
from jax_ddpm._typing import Image, Pixels
from jax_ddpm.data import to_bytes
from jax_ddpm.forward import q_sample
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import new_folder, replacing, write_file
from jax_ddpm.runs.run import PathLike
from jax_ddpm.schedule import NoiseSchedule

_BACKGROUND = 255
_INK = (60, 60, 60)
_LONG_SIDE = 640
_FONT_SIZES = (10, 20)
_NAME_LENGTH = 60


def image_grid(
    images: Image | Pixels, columns: int | None = None, titles: Sequence[str] | None = None
) -> np.ndarray:
    """Images side by side on white, uint8 [height, width, 3], enlarged by whole pixels.

    `titles` are those of the columns, drawn above them: one for each. Raises `FieldError`.
    """
    check_positive(columns=columns)
    count, height, width, _ = images.shape
    if not count:
        raise FieldError("images", "expected at least one, got none")
    named = 0 if titles is None else len(titles)
    columns = columns or named or int(np.ceil(np.sqrt(count)))
    if titles is not None and named != columns:
        raise FieldError("titles", f"expected {columns}, one for each column, got {named}")
    columns = min(columns, count)
    rows = -(-count // columns)
    scale = max(1, _LONG_SIDE // max(columns * width, rows * height))
    gap = max(2, scale // 2)
    pixels = _on_white(to_bytes(images)).repeat(scale, axis=1).repeat(scale, axis=2)
    cell = (height * scale + gap, width * scale + gap)
    shape = (rows * cell[0] + gap, columns * cell[1] + gap, 3)
    canvas = np.full(shape, _BACKGROUND, np.uint8)
    for k, picture in enumerate(pixels):
        top, left = gap + k // columns * cell[0], gap + k % columns * cell[1]
        canvas[top : top + height * scale, left : left + width * scale] = picture
    if titles is None:
        return canvas
    texts = tuple(str(title) for title in titles[:columns])
    return np.concatenate([_header(texts, width * scale, gap), canvas])


def class_columns(run: DiffusionModel) -> int | None:
    """Columns of a grid with one class each, repeated where the classes are few; None if there are
    no classes, or more than 16."""
    count = len(run.drawn)
    return count * max(1, 8 // count) if 0 < count <= 16 else None


def class_titles(run: DiffusionModel) -> tuple[str, ...] | None:
    """Class names, one for each of these columns."""
    columns = class_columns(run)
    if run.class_names is None or columns is None:
        return None
    names = tuple(run.class_names[label] for label in run.drawn)
    return names * (columns // len(names))


def _on_white(pixels: np.ndarray) -> np.ndarray:
    """RGB of uint8 images [image, height, width, channel]; of five channels or more, the first."""
    channels = pixels.shape[-1]
    colours = pixels[..., :3] if channels >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    if channels not in (2, 4):
        return colours
    opacity = pixels[..., -1:].astype(np.uint16)
    mixed = colours * opacity + _BACKGROUND * (255 - opacity)
    return ((mixed + 127) // 255).astype(np.uint8)


@lru_cache(maxsize=1)  # the frames of a GIF share theirs
def _header(titles: tuple[str, ...], width: int, gap: int) -> np.ndarray:
    """Titles [height, width, 3] centred over columns of this width, in one size that suits all."""
    from PIL import Image as pillow
    from PIL import ImageDraw

    titles = tuple(" ".join(title.split()) for title in titles)
    least, most = _FONT_SIZES
    sizes = range(min(most, max(least, width // 3)), least - 1, -1)
    fonts = [_font("".join(titles), size) for size in sizes]
    suit = (font for font in fonts if all(font.getlength(title) <= width for title in titles))
    font = next(suit, fonts[-1])
    height = gap + sum(font.getmetrics())
    canvas = pillow.new("RGB", (len(titles) * (width + gap) + gap, height), (_BACKGROUND,) * 3)
    draw = ImageDraw.Draw(canvas)
    for column, title in enumerate(titles):
        if font.getlength(title) > width:
            lengths = range(len(title), 0, -1)
            shorter = (title[:length].rstrip() + "…" for length in lengths)
            title = next((each for each in shorter if font.getlength(each) <= width), "…")
        left = gap + column * (width + gap)
        draw.text((left + width / 2, gap), title, fill=_INK, font=font, anchor="ma")
    return np.asarray(canvas)


def _font(text: str, size: int) -> Any:
    """Pillow's own font, which knows ASCII; for other text matplotlib's, of many alphabets."""
    from PIL import ImageFont

    if text.isascii():
        return ImageFont.load_default(size)
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), size)


def save_grid(
    file: PathLike | BinaryIO,
    images: Image | Pixels,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
) -> None:
    """Write a grid of images as PNG, with a title above each column if there are any."""
    from PIL import Image as pillow

    pillow.fromarray(image_grid(images, columns, titles)).save(file, format="PNG")


def save_samples(
    path: PathLike,
    images: Image | Pixels,
    labels: np.ndarray | None = None,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write images as a grid, a .png; as numbers, a .npz; or each as its own file, in a folder.

    Args:
      path: the file; without a suffix, a new or empty folder, which gets 00000.png and so on.
      images: the images.
      labels: the class of each: in a .npz beside the images, in a folder part of the file's name.
      columns: of a grid.
      titles: of its columns.
      names: of the classes: in a .npz `class_names`; in a folder they stand in place of the label.

    A .npz holds `samples`, as they are, `labels` if any, and `arr_0`, the samples as uint8, which
    is what Dhariwal & Nichol's evaluator reads. All is written or nothing. Raises `FieldError`
    naming what does not fit, and `OSError`.
    """
    path = Path(path)
    if path.suffix not in (".png", ".npz", "") or not path.name:
        raise FieldError("path", f"expected a .png, a .npz or a new folder, got {path}")
    images = np.asarray(images)
    if images.ndim != 4:
        problem = f"expected [image, height, width, channel], got {images.shape}"
        raise FieldError("images", problem)
    if images.dtype.itemsize == 2:  # NumPy's files know no bfloat16
        images = images.astype(np.float32)
    if not path.suffix:
        _save_each(path, images, labels, names)
        return
    arrays: dict[str, Any] = {"samples": images} | ({} if labels is None else {"labels": labels})
    if labels is not None and names is not None:
        arrays["class_names"] = np.asarray(names, str)
    with replacing(path) as file:
        if path.suffix == ".png":
            save_grid(file, images, columns, titles)
        else:
            np.savez(file, **arrays, arr_0=to_bytes(images))


def _save_each(
    folder: Path, images: Any, labels: np.ndarray | None, names: Sequence[str] | None
) -> None:
    from PIL import Image as pillow

    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FieldError("path", f"expected a new or empty folder, got {folder}")
    pixels = to_bytes(images)
    if pixels.shape[-1] > 4:
        raise FieldError("images", f"expected 1 to 4 channels, got {pixels.shape[-1]}")
    pixels = pixels[..., 0] if pixels.shape[-1] == 1 else pixels
    digits = max(5, len(str(len(pixels) - 1)))
    stems = [f"{number:0{digits}d}" for number in range(len(pixels))]
    if labels is not None:
        suffixes = [_label_name(label, names) for label in labels]
        if len(suffixes) != len(stems):
            problem = f"expected {len(stems)}, one for each image, got {len(suffixes)}"
            raise FieldError("labels", problem)
        stems = [f"{stem}-{suffix}" for stem, suffix in zip(stems, suffixes, strict=True)]
    with new_folder(folder) as new:
        for stem, picture in zip(stems, pixels, strict=True):
            file = BytesIO()
            pillow.fromarray(picture).save(file, format="PNG")
            write_file(new / f"{stem}.png", file.getvalue())


def _label_name(label: Any, names: Sequence[str] | None) -> str:
    """A label, or its name, as a part of a file's name."""
    if names is None:
        return str(label)
    if not 0 <= label < len(names):
        raise FieldError("names", f"expected one for each class, got {len(names)}, none of {label}")
    return re.sub(r"[^\w.]+", "-", str(names[label]))[:_NAME_LENGTH].strip("-.") or str(label)


def save_gif(
    path: PathLike,
    frames: Sequence[Image | Pixels],
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    *,
    hold: int = 25,
) -> None:
    """Write grids of images as a GIF that holds the last one for `hold` frames, then repeats."""
    grids = [image_grid(frame, columns, titles) for frame in frames]
    save_animation(path, grids, 60, hold=hold)


def save_animation(
    file: PathLike | BinaryIO, pictures: Sequence[np.ndarray], milliseconds: int, *, hold: int = 5
) -> None:
    """Write pictures, uint8 [height, width, 3], as a GIF that shows each for so long, the last one
    `hold` times as long, then repeats."""
    from PIL import Image as pillow

    frames = [pillow.fromarray(picture).quantize() for picture in pictures]
    frames[0].save(
        file,
        format="GIF",
        save_all=True,
        append_images=frames[1:],
        duration=[milliseconds] * (len(frames) - 1) + [milliseconds * hold],
        loop=0,
    )


def save_forward(path: PathLike, schedule: NoiseSchedule, image: Any) -> None:
    """Write one image, and the tutorial's white square, at four steps of noise."""
    from matplotlib.figure import Figure

    total = schedule.num_timesteps
    steps = np.unique([0, total // 4, total // 2, total - 1])
    square = np.full((64, 64, 3), -1, np.float32)
    square[16:48, 16:48] = 1
    figure = Figure(figsize=(2 * len(steps), 4.3))
    axes = figure.subplots(2, len(steps), squeeze=False)
    for axis, t in zip(axes[0], steps, strict=True):
        axis.set_title(f"t = {t}", fontsize=10)
    for row, x_start in zip(axes, (image, square), strict=True):
        batch = np.repeat(x_start[None], len(steps), axis=0)
        noise = np.asarray(jax.random.normal(jax.random.key(0), batch.shape))
        noisy = np.asarray(q_sample(schedule, batch, steps, noise))
        for axis, pixels in zip(row, to_bytes(noisy), strict=True):
            pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def save_loss(path: PathLike, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Write the training loss against the step, with a running median over it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    width = len(losses) // 20  # of a median over what is too many points to see through
    alpha = 0.3 if width > 1 else 1.0
    marker = "o" if len(losses) < 10 else None  # of a single one there is no line
    label = f"mean of {min(steps, default=1)} steps"
    axis.plot(steps, losses, marker=marker, color="tab:blue", alpha=alpha, label=label)
    if width > 1:
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(losses), width)
        median = np.median(windows, axis=1)
        axis.plot(steps[width - 1 :], median, color="tab:blue", label="running median")
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_xlabel("training step")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
