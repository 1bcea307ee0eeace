"""Pictures: grids, the forward process, the reverse process as a GIF, the loss.

Images are [image, height, width, channel], float in [-1, 1] or uint8: grey or RGB, and with a
second or fourth channel their opacity.
"""

import math
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jax_ddpm._errors import FieldError, check_between, naming_extras
from jax_ddpm._table import counted
from jax_ddpm._typing import Image, Pixels
from jax_ddpm.data import Dataset, to_bytes, to_float
from jax_ddpm.forward import q_sample
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import new_folder, replacing
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import draw
from jax_ddpm.runs.metrics import Progress, read_metrics
from jax_ddpm.runs.model import METRICS, PICTURES, PathLike
from jax_ddpm.samplers import ancestral
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.hosts import is_writer

with naming_extras():  # the first import of the room that an extra brings
    from PIL import Image as pillow
    from PIL import ImageDraw, ImageFont, ImageOps

Titles = Sequence[str] | None


def image_grid(
    images: Image | Pixels, columns: int | None = None, titles: Titles = None
) -> np.ndarray:
    """Images side by side on white, uint8 [height, width, 3], enlarged by whole pixels to 640 of
    them at most. `titles` stand above the columns, one for each. Raises `FieldError`."""
    pixels = to_bytes(images)
    count, height, width, channels = pixels.shape
    if not count:
        raise FieldError("images", "expected at least one, got none")
    columns = columns or len(titles or ()) or math.ceil(math.sqrt(count))
    if titles is not None and len(titles) != columns:
        raise FieldError("titles", f"expected {columns}, one for each column, got {len(titles)}")
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    scale = max(1, 640 // max(columns * width, rows * height))
    gap, height, width = max(2, scale // 2), height * scale, width * scale
    size = (columns * (width + gap) + gap, rows * (height + gap) + gap)
    grid = pillow.new("RGB", size, "white")
    for k, picture in enumerate(_pictures(pixels if channels <= 4 else pixels[..., :3])):
        row, column = divmod(k, columns)
        large = picture.convert("RGBA").resize((width, height), pillow.Resampling.NEAREST)
        grid.paste(large, (gap + column * (width + gap), gap + row * (height + gap)), mask=large)
    return np.array(_titled(grid, titles[:columns], width, gap) if titles else grid)


def _pictures(pixels: np.ndarray) -> Iterator[pillow.Image]:
    """Each of uint8 images [image, height, width, channel]."""
    return map(pillow.fromarray, pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _titled(grid: pillow.Image, titles: Sequence[str], width: int, gap: int) -> pillow.Image:
    """The grid below titles of one size, 10 to 20, that suits the longest."""
    import matplotlib

    titles = [" ".join(str(title).split()) for title in titles]
    # Pillow's own font knows ASCII; this, many alphabets.
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), 20)
    longest = max(map(font.getlength, titles))
    font = font.font_variant(size=max(10, 20 * width // max(longest, width)))
    grid = ImageOps.expand(grid, (0, gap + sum(font.getmetrics()), 0, 0), "white")
    for column, title in enumerate(titles):
        while len(title) > 1 and font.getlength(title) > width:
            title = title[:-2] + "…"
        middle = gap + column * (width + gap) + width / 2
        ImageDraw.Draw(grid).text((middle, gap), title, (60, 60, 60), font, anchor="ma")
    return grid


def class_columns(run: DiffusionModel) -> tuple[int | None, Titles]:
    """Columns of a grid with one class each, which repeat if few, and their names, if known. None
    for 0 or more than 16 classes."""
    count = len(run.drawn)
    if not 0 < count <= 16:
        return None, None
    labels = np.resize(run.drawn, count * max(1, 8 // count)).tolist()
    return len(labels), run.class_names and [run.class_names[label] for label in labels]


def save_grid(
    file: PathLike | BinaryIO,
    images: Image | Pixels,
    columns: int | None = None,
    titles: Titles = None,
) -> None:
    """Write a grid of images as PNG, enlarged by whole pixels to 640 of them at most.

    Args:
      file: path, or binary file.
      images: [image, height, width, channel], floats in [-1, 1] or uint8, row by row.
      columns, titles: how many columns, by default those of a square, and a title for each.

    Examples:
      >>> from PIL import Image
      >>> runs.save_grid("grid.png", np.zeros((10, 8, 8, 1)), columns=5)
      >>> with Image.open("grid.png") as grid:
      ...     grid.size  # 16 times enlarged, between gaps of 8
      (688, 280)
    """
    pillow.fromarray(image_grid(images, columns, titles)).save(file, format="PNG")


def save_samples(
    path: PathLike,
    images: Image | Pixels,
    labels: np.ndarray | None = None,
    columns: int | None = None,
    titles: Titles = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write images as one grid, as arrays for evaluation, or as single pictures.

    Args:
      path: a .png for a grid; a .npz of `samples`, as they are, `arr_0`, as uint8 for Dhariwal &
        Nichol's evaluator, `labels` and `class_names`; or a new folder, with a .png for each image.
      images: [image, height, width, channel], floats in [-1, 1] or uint8.
      labels, names: the class of each image, integers [image], and the names of the classes.
      columns, titles: of a grid, as in `save_grid`.

    Raises:
      FieldError: the path has another suffix, or the arguments do not fit each other.

    Examples:
      >>> from pathlib import Path
      >>> digits = data.load_dataset("digits")[:2]
      >>> runs.save_samples("two.npz", digits.images, digits.labels)
      >>> runs.save_samples("two", digits.images, digits.labels, names=["zero", "one"])
      >>> sorted(np.load("two.npz")), sorted(path.name for path in Path("two").iterdir())
      (['arr_0', 'labels', 'samples'], ['00000-zero.png', '00001-one.png'])
    """
    path, images = Path(path), np.asarray(images)
    if path.suffix not in (".png", ".npz", "") or not path.name:
        raise FieldError("path", f"expected a .png, a .npz or a new folder, got {path}")
    if images.ndim != 4:
        expected = "expected [image, height, width, channel]"
        raise FieldError("images", f"{expected}, got {images.shape}")
    if images.dtype.itemsize == 2:  # NumPy's files know no bfloat16
        images = images.astype(np.float32)
    if labels is None:
        names = None
    elif len(labels) != len(images):
        raise FieldError("labels", f"expected one for each image, {len(images)}, got {len(labels)}")
    elif names is not None:
        check_between("labels", labels, 0, len(names) - 1)
    pixels = to_bytes(images)
    if path.suffix == ".png":
        with replacing(path) as file:
            save_grid(file, pixels, columns, titles)
    elif path.suffix == ".npz":
        arrays = {"samples": images, "arr_0": pixels, "labels": labels, "class_names": names}
        given: Any = {name: array for name, array in arrays.items() if array is not None}
        with replacing(path) as file:
            np.savez(file, **given)
    else:
        with new_folder(path) as new:
            for number, picture in enumerate(_pictures(pixels)):
                name = f"{number:05d}"
                if labels is not None:
                    name += f" {names[labels[number]] if names else labels[number]}"
                picture.save(new / (re.sub(r"\W+", "-", name) + ".png"))


def save_gif(
    path: PathLike,
    frames: Sequence[Image | Pixels],
    columns: int | None = None,
    titles: Titles = None,
    *,
    hold: int = 25,
) -> None:
    """Write grids of images as a GIF that repeats, such as a reverse process.

    Args:
      path: of the GIF.
      frames: the images of each frame.
      columns, titles: of each grid, as in `save_grid`.
      hold: how long the last frame stays, in frames of 60 ms.

    Examples:
      >>> model, states = runs.load_run("runs/digits"), []
      >>> images = runs.draw(jax.random.key(0), model, 4, steps=2, watch=states.append)
      >>> runs.save_gif("reverse.gif", states)
    """
    save_animation(path, [image_grid(each, columns, titles) for each in frames], 60, hold=hold)


def save_animation(
    file: PathLike | BinaryIO, pictures: Sequence[np.ndarray], milliseconds: int, *, hold: int = 5
) -> None:
    """Write pictures, uint8 [height, width, 3], as a GIF that repeats; `hold` is of the last."""
    first, *others = (pillow.fromarray(picture).quantize() for picture in pictures)
    options: Any = {"duration": [milliseconds] * len(others) + [milliseconds * hold], "loop": 0}
    first.save(file, format="GIF", save_all=True, append_images=others, **options)


def save_forward(path: PathLike, schedule: NoiseSchedule, images: Any) -> None:
    """Write images at four steps t of the forward process, q(x_t | x_0), as a PNG.

    Args:
      path, schedule: the PNG, and the chain's tables.
      images: [height, width, channel], or [image, …] for a row each; floats in [-1, 1] or uint8.
    """
    total, rows = schedule.num_timesteps, to_float(images)
    steps = np.unique([0, total // 4, total // 2, total - 1])
    x_start = np.repeat(rows.reshape(-1, *rows.shape[-3:]), len(steps), axis=0)
    t = np.resize(steps, len(x_start))
    noise = np.asarray(jax.random.normal(jax.random.key(0), x_start.shape, x_start.dtype))
    noisy = np.asarray(q_sample(schedule, x_start, t, noise))
    save_grid(path, noisy, len(steps), [f"t = {step}" for step in steps])


def save_loss(path: PathLike, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Plot the training loss against the step, with a running median.

    Args:
      path: the picture; its suffix is its format.
      steps, losses: `step` and `loss` of the lines of `read_metrics`, without losses of None.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(7, 4), layout="tight")
    axis = figure.subplots()
    width = len(losses) // 20  # of a median over what is too many points to see through
    style: Any = {"alpha": 0.3} if width > 1 else {"marker": "o"}
    label = f"mean of {counted(min(steps, default=1), 'step')}"
    axis.semilogy(steps, losses, color="tab:blue", label=label, **style)
    if width > 1:
        median = np.median(np.lib.stride_tricks.sliding_window_view(losses, width), axis=1)
        axis.semilogy(steps[width - 1 :], median, color="tab:blue", label="running median")
    axis.set(xlabel="training step", ylabel="training loss")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
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
    """Write loss.png, forward.png, samples.png and reverse.gif, as `jax-ddpm train` does.

    Args:
      folder, run, data: the folder of a run, its model (`run` of a `Fit`), the training images.
      seed, progress: of the samples, and as in `draw`.
    """
    folder, schedule, frames = Path(folder), run.schedule, []
    columns, titles = class_columns(run)
    columns = columns or 8
    chain = schedule if schedule.num_timesteps <= 200 else run.chain(200)
    options: Any = {"chain": chain, "sampler": ancestral(), "progress": progress}
    options["watch"] = lambda x_t: frames.append(x_t[: 2 * columns])
    samples = draw(jax.random.fold_in(seed_key(seed), 1), run, 8 * columns, **options)
    if not is_writer():
        return
    lines = [line for line in read_metrics(folder / METRICS) if line["loss"] is not None]
    two = data.whole(np.unique([0, len(data.images) // 2]))
    with tempfile.TemporaryDirectory(prefix=".pictures", dir=folder) as name:
        new = Path(name)
        save_grid(new / "samples.png", samples, columns, titles)
        save_gif(new / "reverse.gif", frames, columns, titles)
        save_forward(new / "forward.png", schedule, two)
        save_loss(new / "loss.png", *([line[x] for line in lines] for x in ("step", "loss")))
        for picture in PICTURES:
            os.replace(new / picture, folder / picture)
