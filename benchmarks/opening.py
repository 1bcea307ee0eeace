"""What opening a checkpoint costs, here and in diffusers: `python -m benchmarks.opening`.

Linux only.
The network is that of google's ddpm-celebahq-256, 114 million parameters, with random weights in
safetensors. Each side is a process of its own, in turns: seconds until the network is there, until
each of its weights was read once (summed), and how far the highest resident memory rose.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

import jax_ddpm as ddpm
from benchmarks.harness import cores, resident_bytes, summary
from jax_ddpm.interop import DiffusionModel, save_diffusers

__all__ = ["main"]

_ROUNDS = 5


def main(argv: list[str] | None = None) -> None:
    """Print a line for each side."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.opening",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--open", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.open:
        side, folder = arguments.open
        print(json.dumps(_theirs(folder) if side == "diffusers" else _ours(folder)))
        return
    print(f"jax {jax.__version__}, {cores()} cores; median (lowest to highest)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "ddpm-celebahq-256"
        save_diffusers(folder, _pretrained())
        sides = ("jax_ddpm", "diffusers")
        rounds = [[_measured(side, folder) for side in sides] for _ in range(_ROUNDS + 1)]
    for place, side in enumerate(sides):
        opened, read, memory = (
            summary([each[place][number] for each in rounds[1:]]) for number in range(3)
        )
        print(
            f"{side}: opened in {opened[0]:.2f} s ({opened[1]:.2f} to {opened[2]:.2f}), all read "
            f"after {read[0]:.2f} s ({read[1]:.2f} to {read[2]:.2f}), memory {memory[0]:.0f} MiB"
        )


def _pretrained() -> DiffusionModel:
    model, random = ddpm.ddpm_celebahq(), np.random.default_rng(0)
    x, t = np.zeros((1, 32, 32, 3), np.float32), np.zeros(1, np.int32)
    variables = jax.tree.map(
        lambda leaf: random.standard_normal(leaf.shape, np.float32),
        jax.eval_shape(model.init, jax.random.key(0), x, t),
    )
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    return DiffusionModel(model, variables, schedule, (256, 256, 3))


def _measured(side: str, folder: Path) -> list[float]:
    command = [sys.executable, "-m", "benchmarks.opening", "--open", side, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _ours(folder: str) -> list[float]:
    before, start = resident_bytes("VmHWM"), time.perf_counter()
    pretrained = ddpm.interop.load_diffusers(folder)
    opened = time.perf_counter() - start
    sum(np.sum(leaf, dtype=np.float32) for leaf in jax.tree.leaves(pretrained.variables))
    read = time.perf_counter() - start
    return [opened, read, (resident_bytes("VmHWM") - before) / 2**20]


def _theirs(folder: str) -> list[float]:
    from diffusers.models.unets.unet_2d import UNet2DModel

    before, start = resident_bytes("VmHWM"), time.perf_counter()
    network = UNet2DModel.from_pretrained(f"{folder}/unet")
    opened = time.perf_counter() - start
    sum(parameter.sum().item() for parameter in network.parameters())
    read = time.perf_counter() - start
    return [opened, read, (resident_bytes("VmHWM") - before) / 2**20]


if __name__ == "__main__":
    main()
