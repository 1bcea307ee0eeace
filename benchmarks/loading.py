"""What a training's images cost: `python -m benchmarks.loading`. Linux only.

    decoded     images a second from decoded rows on the disk, 32×32×3, in batches of 128
    JPEG        pictures of 500×500 a second: read, decoded, resized to 64×64, and written to the
                cache
    memory      what the process of the tutorial's training owns at its end, without mapped files,
                on a .npy of 6 GiB, 64×64×3, and of the same training on 1,024 of its images
    waiting     the share of its time that a training of `ddpm_cifar10` waits for its images, once
                the first 50 steps are done

A training is a process of its own.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.harness import cores, resident_bytes, summary, timed
from jax_ddpm.cpu import use_cores
from jax_ddpm.data import Preparation, load_dataset
from jax_ddpm.data.batches import Order, prefetched
from jax_ddpm.runs import RECIPES, Settings, fit
from jax_ddpm.runs.settings import LOG_EVERY
from jax_ddpm.training.sharding import device_mesh

__all__ = ["main"]

_ROUNDS = 5
_SMALL = "32x32.npy"
_GIB = 2**30


def main(argv: list[str] | None = None) -> None:
    """Print a line for each measurement."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gib", type=float, default=6.0, help="size of the .npy (default: 6)")
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary one)")
    parser.add_argument("--train", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    use_cores()
    if arguments.train:
        print(json.dumps(_train(*arguments.train)))
        return
    print(f"jax {jax.__version__}, {cores()} cores; median (lowest to highest)", flush=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        _say("decoded, images a second", _decoded(folder))
        _say("JPEG, pictures a second", _jpeg(folder))
        large, small = _arrays(folder, arguments.gib)
        for batch in (16, 64):
            for data in (small, large):
                _print_training(folder, data, "tutorial", batch)
        _print_training(folder, folder / _SMALL, "cifar10", batch=8)


def _say(what: str, rates: list[float]) -> None:
    median, lowest, highest = summary(rates)
    print(f"{what}: {median:,.0f} ({lowest:,.0f} to {highest:,.0f})", flush=True)


def _decoded(folder: Path, count: int = 50_000, batch_size: int = 128) -> list[float]:
    """Batches as a training gets them, on its devices; after a first round nothing is cold."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, 32, 32, 3), np.uint8)
    np.save(folder / _SMALL, pixels)
    images = np.load(folder / _SMALL, mmap_mode="r")
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

    photos, random = load_sample_images().images, np.random.default_rng(0)
    pictures = folder / "pictures"
    pictures.mkdir()
    for number in range(count):
        photo = photos[number % len(photos)]
        top = random.integers(0, photo.shape[0] - 400)
        left = random.integers(0, photo.shape[1] - 400)
        window = Image.fromarray(photo[top : top + 400, left : left + 400]).resize((500, 500))
        window.save(pictures / f"{number}.jpg", quality=90)

    def decode(number: int) -> None:
        load_dataset(pictures, Preparation(image_size=64), cache=folder / f"cache{number}")

    return [count / timed(lambda n=number: decode(n))[1] for number in range(_ROUNDS)]


def _arrays(folder: Path, gib: float) -> tuple[Path, Path]:
    """A .npy of so many GiB, 64×64×3, and one of 1,024 of its images."""
    large, small, block = folder / "large.npy", folder / "small.npy", 1024
    blocks = max(2, round(gib * _GIB / (block * 64 * 64 * 3)))
    shape = (blocks * block, 64, 64, 3)
    images = np.lib.format.open_memmap(large, "w+", np.uint8, shape)
    random = np.random.default_rng(0)
    for start in range(0, len(images), block):
        images[start : start + block] = random.integers(0, 256, (block, *shape[1:]), np.uint8)
    np.save(small, images[:block])
    images.flush()
    return large, small


def _print_training(folder: Path, data: Path, name: str, batch: int) -> None:
    """Its last line of metrics is of the ten steps after the first fifty."""
    with tempfile.TemporaryDirectory(dir=folder) as run:
        arguments = ["--train", str(data), run, name, str(batch), str(LOG_EVERY + 10)]
        command = [sys.executable, "-m", "benchmarks.loading", *arguments]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    end = json.loads(output.splitlines()[-1])
    print(
        f"{name}, batches of {batch}, {data.stat().st_size / _GIB:.2f} GiB of images: "
        f"{end['owned'] / _GIB:.2f} GiB of its own, {end['images_per_second']:.1f} images a "
        f"second, waiting {end['waiting']:.2%}",
        flush=True,
    )


def _train(data: str, run: str, name: str, batch: str, steps: str) -> dict[str, Any]:
    """Of this process's training: its last line of metrics, and its memory."""
    base = RECIPES[name].settings if name in RECIPES else Settings(model="simple")
    settings = dataclasses.replace(
        base, batch_size=int(batch), steps=int(steps), log_every=LOG_EVERY
    )
    lines: list[dict[str, Any]] = []
    fit(run, load_dataset(data), settings, progress=lambda here: lines.append(here.line or {}))
    return {**lines[-1], "owned": resident_bytes("RssAnon")}


if __name__ == "__main__":
    main()
