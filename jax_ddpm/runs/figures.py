"""The pictures: grids, strips of the forward process, the reverse process as a GIF, the loss.

Images come in as [image, height, width, channel], float in [-1, 1] or uint8; one or three channels
are grey or RGB, and two or four these with their opacity, which grids draw on white.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np
from PIL import Image as pillow
from PIL import ImageDraw, ImageFont

from jax_ddpm._errors import FieldError, check_between, check_positive
from jax_ddpm._typing import Image, Pixels
from jax_ddpm.data import Dataset, to_bytes, to_float
from jax_ddpm.forward import q_sample
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import new_folder, replacing, write_file
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import draw
from jax_ddpm.runs.metrics import Progress, read_metrics
from jax_ddpm.runs.model import METRICS, PICTURES, PathLike
from jax_ddpm.samplers import ancestral
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.hosts import is_writer

Titles = Sequence[str] | None


def image_grid(
    images: Image | Pixels, columns: int | None = None, titles: Titles = None
) -> np.ndarray:
    """Images side by side on white, uint8 [height, width, 3], enlarged by whole pixels to 640 of
    them at most. `titles` stand above the columns, one for each. Raises `FieldError`."""
    check_positive(columns=columns)
    pictures = [_picture(pixels) for pixels in to_bytes(images)]
    if not pictures:
        raise FieldError("images", "expected at least one, got none")
    columns = columns or len(titles or ()) or math.ceil(math.sqrt(len(pictures)))
    if titles is not None and len(titles) != columns:
        raise FieldError("titles", f"expected {columns}, one for each column, got {len(titles)}")
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    width, height = pictures[0].size
    scale = max(1, 640 // max(columns * width, rows * height))
    gap, width, height = max(2, scale // 2), width * scale, height * scale
    titles = [" ".join(str(title).split()) for title in (titles or ())[:columns]]
    font: Any = _font(titles, width) if titles else None
    top = gap + sum(font.getmetrics()) if titles else 0
    size = (columns * (width + gap) + gap, top + rows * (height + gap) + gap)
    canvas = pillow.new("RGB", size, "white")
    for k, picture in enumerate(pictures):
        corner = (gap + k % columns * (width + gap), top + gap + k // columns * (height + gap))
        large = picture.resize((width, height), pillow.Resampling.NEAREST)
        opacity = large.getchannel("A") if large.mode in ("LA", "RGBA") else None
        canvas.paste(large.convert("RGB"), corner, opacity)
    for column, title in enumerate(titles):
        while len(title) > 1 and font.getlength(title) > width:
            title = title.removesuffix("…")[:-1].rstrip() + "…"
        middle = gap + column * (width + gap) + width / 2
        ImageDraw.Draw(canvas).text((middle, gap), title, (60, 60, 60), font, anchor="ma")
    return np.asarray(canvas)


def _picture(pixels: np.ndarray) -> pillow.Image:
    """Bytes [height, width, channel] as Pillow's image; of five channels or more, the first."""
    channels = pixels.shape[-1]
    pixels = pixels[..., :3] if channels > 4 else pixels
    return pillow.fromarray(pixels[..., 0] if channels == 1 else pixels)


def _font(titles: Sequence[str], width: int) -> ImageFont.FreeTypeFont:
    """One size for all titles, 10 to 20. Pillow's own font knows ASCII; this, many alphabets."""
    import matplotlib

    path = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")
    longest = max(ImageFont.truetype(path, 20).getlength(title) for title in titles)
    return ImageFont.truetype(path, max(10, min(20, 20 * width // max(longest, 1))))


def class_columns(run: DiffusionModel) -> int | None:
    """Columns of a grid with one class each, which repeat if few; None for 0 or more than 16."""
    count = len(run.drawn)
    return count * max(1, 8 // count) if 0 < count <= 16 else None


def class_titles(run: DiffusionModel) -> tuple[str, ...] | None:
    """Class names, one for each of these columns."""
    columns = class_columns(run)
    if run.class_names is None or columns is None:
        return None
    return tuple(run.class_names[label] for label in np.resize(run.drawn, columns))


def save_grid(
    file: PathLike | BinaryIO,
    images: Image | Pixels,
    columns: int | None = None,
    titles: Titles = None,
) -> None:
    """Write a grid of images as PNG, with a title above each column if there are any."""
    pillow.fromarray(image_grid(images, columns, titles)).save(file, format="PNG")


def save_samples(
    path: PathLike,
    images: Image | Pixels,
    labels: np.ndarray | None = None,
    columns: int | None = None,
    titles: Titles = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write images as a grid, a .png, with these `columns` and `titles`; as numbers, a .npz; or,
    where `path` has no suffix, each as a .png of its own, in a new or empty folder.

    A .npz holds `samples`, as they are, `labels` and `class_names` if any, and `arr_0`, the samples
    as uint8, which is what Dhariwal & Nichol's evaluator reads. In a folder the label of an image,
    or its name of `names`, is part of the file's. All is written or nothing. Raises `FieldError`
    naming what does not fit, and `OSError`.
    """
    path, images = Path(path), np.asarray(images)
    if path.suffix not in (".png", ".npz", "") or not path.name:
        raise FieldError("path", f"expected a .png, a .npz or a new folder, got {path}")
    if images.ndim != 4:
        problem = f"expected [image, height, width, channel], got {images.shape}"
        raise FieldError("images", problem)
    if images.dtype.itemsize == 2:  # NumPy's files know no bfloat16
        images = images.astype(np.float32)
    arrays: dict[str, Any] = {"samples": images}
    if labels is not None:
        if len(labels) != len(images):
            problem = f"expected {len(images)}, one for each image, got {len(labels)}"
            raise FieldError("labels", problem)
        arrays["labels"] = labels
        if names is not None:
            check_between("labels", labels, 0, len(names) - 1)
            arrays["class_names"] = np.asarray(names, str)
    if path.suffix:
        with replacing(path) as file:
            if path.suffix == ".png":
                save_grid(file, images, columns, titles)
            else:
                np.savez(file, **arrays, arr_0=to_bytes(images))
        return
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FieldError("path", f"expected a new or empty folder, got {path}")
    if images.shape[-1] > 4:
        raise FieldError("images", f"expected 1 to 4 channels, got {images.shape[-1]}")
    pictures = [_picture(pixels) for pixels in to_bytes(images)]
    digits = max(5, len(str(len(pictures) - 1)))  # names sort as numbers do
    with new_folder(path) as new:
        for number, picture in enumerate(pictures):
            name, file = f"{number:0{digits}d}", BytesIO()
            if labels is not None:
                called = labels[number] if names is None else names[labels[number]]
                safe = re.sub(r"[^\w.]+", "-", str(called))[:60].strip("-.")
                name += f"-{safe or labels[number]}"
            picture.save(file, format="PNG")
            write_file(new / f"{name}.png", file.getvalue())


def save_gif(
    path: PathLike,
    frames: Sequence[Image | Pixels],
    columns: int | None = None,
    titles: Titles = None,
    *,
    hold: int = 25,
) -> None:
    """Write grids of images as a GIF that holds the last one for `hold` frames, then repeats."""
    save_animation(path, [image_grid(each, columns, titles) for each in frames], 60, hold=hold)


def save_animation(
    file: PathLike | BinaryIO, pictures: Sequence[np.ndarray], milliseconds: int, *, hold: int = 5
) -> None:
    """Write pictures, uint8 [height, width, 3], as a GIF that repeats; `hold` is of the last."""
    first, *others = (pillow.fromarray(picture).quantize() for picture in pictures)
    options: Any = {"duration": [milliseconds] * len(others) + [milliseconds * hold], "loop": 0}
    first.save(file, format="GIF", save_all=True, append_images=others, **options)


def save_forward(path: PathLike, schedule: NoiseSchedule, images: Any) -> None:
    """Write an image [height, width, channel], or several, a row each, at four steps of noise."""
    total, rows = schedule.num_timesteps, to_float(images)
    steps = np.unique([0, total // 4, total // 2, total - 1])
    x_start = np.repeat(rows.reshape(-1, *rows.shape[-3:]), len(steps), axis=0)
    t = np.resize(steps, len(x_start))
    noise = np.asarray(jax.random.normal(jax.random.key(0), x_start.shape, x_start.dtype))
    noisy = np.asarray(q_sample(schedule, x_start, t, noise))
    save_grid(path, noisy, len(steps), [f"t = {step}" for step in steps])


def save_loss(path: PathLike, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Write the training loss against the step, with a running median over it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.subplots()
    width = len(losses) // 20  # of a median over what is too many points to see through
    style: Any = {"alpha": 0.3} if width > 1 else {"marker": "o"}
    label = f"mean of {min(steps, default=1)} steps"
    axis.semilogy(steps, losses, color="tab:blue", label=label, **style)
    if width > 1:
        median = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1)
        axis.semilogy(steps[width - 1 :], median, color="tab:blue", label="running median")
    axis.set(xlabel="training step", ylabel="training loss")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.savefig(path, dpi=120)


def save_pictures(
    folder: PathLike,
    run: DiffusionModel,
    data: Dataset,
    *,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Draw from a run that was trained in `folder`, and write all of `PICTURES` there, or none."""
    folder, schedule, frames = Path(folder), run.schedule, []
    columns, titles = class_columns(run) or 8, class_titles(run)
    samples = draw(
        jax.random.fold_in(seed_key(seed), 1),
        run,
        8 * columns,
        chain=schedule if schedule.num_timesteps <= 200 else run.chain(200),
        sampler=ancestral(),
        progress=progress,
        watch=lambda x_t: frames.append(x_t[: 2 * columns]),
    )
    if not is_writer():
        return
    lines = [line for line in read_metrics(folder / METRICS) if line["loss"] is not None]
    two = data.whole(np.unique([0, len(data.images) // 2]))
    with tempfile.TemporaryDirectory(prefix=".pictures", dir=folder) as name:
        new = Path(name)
        save_grid(new / "samples.png", samples, columns, titles)
        save_gif(new / "reverse.gif", frames, columns, titles)
        save_forward(new / "forward.png", schedule, two)
        save_loss(
            new / "loss.png", [line["step"] for line in lines], [line["loss"] for line in lines]
        )
        for picture in PICTURES:
            os.replace(new / picture, folder / picture)
