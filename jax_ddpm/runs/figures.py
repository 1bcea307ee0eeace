"""The pictures: grids, strips of the forward process, the reverse process as a GIF, the loss.

Images come in as float [image, height, width, channel] in [-1, 1].
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jax
import numpy as np

from jax_ddpm._checks import FieldError, check_positive, checked
from jax_ddpm._typing import Image, Picture
from jax_ddpm.forward import q_sample
from jax_ddpm.io.files import replacing
from jax_ddpm.runs.run import PathLike
from jax_ddpm.schedule import NoiseSchedule

__all__ = ["image_grid", "save_forward", "save_gif", "save_grid", "save_loss", "save_samples"]

_BACKGROUND = 255
_LONG_SIDE = 640


def image_grid(images: Image, columns: int | None = None) -> np.ndarray:
    """Images side by side on white, uint8 [height, width, 3], enlarged by whole pixels."""
    check_positive(columns=columns)
    count, height, width, channels = images.shape
    columns = min(columns or int(np.ceil(np.sqrt(count))), count)
    rows = -(-count // columns)
    scale = max(1, _LONG_SIDE // max(columns * width, rows * height))
    gap = max(2, scale // 2)
    pixels = np.clip((images + 1) * 127.5, 0, 255).round().astype(np.uint8)
    # Two channels are a picture and its opacity, four are RGB and opacity, which is not drawn.
    pixels = pixels[..., :3] if channels >= 3 else np.repeat(pixels[..., :1], 3, axis=-1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    cell = (height * scale + gap, width * scale + gap)
    shape = (rows * cell[0] + gap, columns * cell[1] + gap, 3)
    canvas = np.full(shape, _BACKGROUND, np.uint8)
    for k, picture in enumerate(pixels):
        top, left = gap + k // columns * cell[0], gap + k % columns * cell[1]
        canvas[top : top + height * scale, left : left + width * scale] = picture
    return canvas


@checked
def save_grid(file: PathLike | BinaryIO, images: Image, columns: int | None = None) -> None:
    """Write a grid of images as PNG."""
    from PIL import Image as pillow

    pillow.fromarray(image_grid(images, columns)).save(file, format="PNG")


@checked
def save_samples(
    path: PathLike, images: Image, labels: np.ndarray | None = None, columns: int | None = None
) -> None:
    """Write images as a grid, .png, or as numbers: `samples`, and `labels` if any, in a .npz."""
    path = Path(path)
    if path.suffix not in (".png", ".npz"):
        raise FieldError("path", f"expected a .png or a .npz, got {path}")
    arrays: dict[str, Any] = {"samples": images} | ({} if labels is None else {"labels": labels})
    with replacing(path) as file:
        if path.suffix == ".png":
            save_grid(file, images, columns=columns)
        else:
            np.savez(file, **arrays)


@checked
def save_gif(
    path: PathLike, frames: Sequence[Image], columns: int | None = None, *, hold: int = 25
) -> None:
    """Write grids of images as a GIF that holds the last one for `hold` frames, then repeats."""
    from PIL import Image as pillow

    pictures = [pillow.fromarray(image_grid(frame, columns)).convert("P") for frame in frames]
    pictures[0].save(
        path,
        format="GIF",
        save_all=True,
        append_images=pictures[1:],
        duration=[60] * (len(pictures) - 1) + [60 * hold],
        loop=0,
    )


@checked
def save_forward(path: PathLike, schedule: NoiseSchedule, image: Picture) -> None:
    """Write one image, and the tutorial's white square, at four steps of noise."""
    from matplotlib.figure import Figure

    total = schedule.num_timesteps
    steps = np.unique([0, total // 4, total // 2, total - 1])
    square = np.full((64, 64, 3), -1, np.float32)
    square[16:48, 16:48] = 1
    figure = Figure(figsize=(2 * len(steps), 4.3))
    axes = figure.subplots(2, len(steps), squeeze=False)
    for row, x_start in zip(axes, (image, square), strict=True):
        batch = np.repeat(x_start[None], len(steps), axis=0)
        noise = np.asarray(jax.random.normal(jax.random.key(0), batch.shape))
        noisy = np.asarray(q_sample(schedule, batch, steps, noise))
        for axis, x_t, t in zip(row, noisy, steps, strict=True):
            pixels = np.clip((x_t + 1) / 2, 0, 1)
            pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., 0]
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.set_title(f"t = {t}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@checked
def save_loss(path: PathLike, steps: Sequence[int], losses: Sequence[float]) -> None:
    """Write the training loss against the step, with a running median over it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    figure = Figure(figsize=(7, 4))
    axis = figure.subplots()
    width = len(losses) // 20  # of a median over what is too many points to see through
    alpha = 0.3 if width > 1 else 1.0
    axis.plot(steps, losses, color="tab:blue", alpha=alpha, label="mean of 50 steps")
    if width > 1:
        windows = np.lib.stride_tricks.sliding_window_view(np.asarray(losses), width)
        axis.plot(
            steps[width - 1 :], np.median(windows, axis=1), color="tab:blue", label="running median"
        )
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("training step")
    axis.set_ylabel("training loss")
    axis.grid(alpha=0.3, which="both")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
