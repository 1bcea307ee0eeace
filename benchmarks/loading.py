"""What a training's images cost. Linux only.

decoded     images a second from decoded rows on the disk, 32×32×3, in batches of 128
JPEG        pictures of 500×500 a second: read, decoded, resized to 64×64, and written to the cache
training    in a new process: what it owns at its end, without mapped files, and the share of its
            time that it waits for images once the first 50 steps are done; the tutorial's on a
            .npy of 6 GiB, 64×64×3, and on 1,024 of its images; `ddpm_cifar10`'s
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.harness import Row, in_new_process, resident_bytes, say, timed
from jax_ddpm.cpu import use_cores
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.data.batches import Order, prefetched
from jax_ddpm.runs import RECIPES, Settings, fit
from jax_ddpm.training.sharding import device_mesh

_ROUNDS, _BLOCK, _BLOCKS = 5, 1024, 512  # 6 GiB


def loading(full: bool) -> list[Row]:
    """What images cost in themselves, and in trainings."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        say("decoded images, and pictures …")
        rows: list[Row] = [
            {"what": "decoded", "images_per_second": _decoded(folder)},
            {"what": "JPEG", "images_per_second": _jpeg(folder)},
        ]
        say("trainings …")
        _write_large(folder)
        trainings = [
            ("tutorial", f"{size}.npy", n) for n in (16, 64) for size in ("small", "large")
        ]
        for name, data, batch in [*trainings, ("cifar10", "32x32.npy", 8)]:
            row = in_new_process(_train, folder / data, name, batch)
            rows.append({"what": f"training, {name}", "images": data, "batch": batch, **row})
    return rows


def _decoded(folder: Path, count: int = 50_000, batch_size: int = 128) -> list[float]:
    """Batches as a training gets them, on its devices; after a first round nothing is cold."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.save(folder / "32x32.npy", pixels)
    images = np.load(folder / "32x32.npy", mmap_mode="r")
    order = Order(jax.random.key(0), count, batch_size)
    dispatches = [range(step, step + 1) for step in range(2 * count // batch_size)]
    sharding = NamedSharding(device_mesh(batch_size), P(None, ("data", "fsdp")))

    def read() -> None:
        for batch in prefetched({"images": images}, order, dispatches, sharding):
            jax.block_until_ready(batch)

    seconds = [timed(read)[1] for _ in range(_ROUNDS + 1)]
    return [len(dispatches) * batch_size / each for each in seconds[1:]]


def _jpeg(folder: Path, count: int = 1000) -> list[float]:
    """Windows of scikit-learn's photographs, each decoded anew into an empty cache."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    random, pictures = np.random.default_rng(0), folder / "pictures"
    photos = [Image.fromarray(photo) for photo in load_sample_images().images]
    pictures.mkdir()
    for number in range(count):
        photo = photos[number % len(photos)]
        left, top = random.integers(0, (photo.width - 400, photo.height - 400))
        window = photo.crop((left, top, left + 400, top + 400)).resize((500, 500))
        window.save(pictures / f"{number}.jpg", quality=90)

    def decode(number: int) -> None:
        load_dataset(pictures, Preparation(image_size=64), cache=folder / f"cache{number}")

    return [count / timed(lambda n=number: decode(n))[1] for number in range(_ROUNDS)]


def _write_large(folder: Path) -> None:
    """A .npy of 64×64×3, and one of its first images."""
    block = np.random.default_rng(0).integers(0, 256, (_BLOCK, 64, 64, 3), np.uint8)
    np.save(folder / "small.npy", block)
    shape = (_BLOCKS * _BLOCK, 64, 64, 3)
    images = np.lib.format.open_memmap(folder / "large.npy", "w+", np.uint8, shape)
    for start in range(0, len(images), _BLOCK):
        images[start : start + _BLOCK] = block
    images.flush()


def _train(data: Path, name: str, batch: int) -> Row:
    """The last line of metrics is of the ten steps after the first fifty."""
    use_cores()
    base = RECIPES[name].settings if name in RECIPES else Settings(model="simple")
    settings = dataclasses.replace(base, batch_size=batch, steps=60, log_every=50)
    lines: list[Any] = []
    with tempfile.TemporaryDirectory(dir=data.parent) as run:
        fit(run, load_dataset(data), settings, progress=lambda here: lines.append(here.line))
    end = {name: lines[-1][name] for name in ("images_per_second", "waiting")}
    return {**end, "bytes": resident_bytes("RssAnon")}
