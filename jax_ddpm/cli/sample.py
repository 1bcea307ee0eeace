"""`jax-ddpm sample`: images from a trained run or a diffusers checkpoint."""

from typing import Any

import jax
import numpy as np

from jax_ddpm._checks import check_positive
from jax_ddpm.cli.chain import load_chain, make_sampler
from jax_ddpm.cli.config import SampleConfig
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.errors import check_file, naming, writing
from jax_ddpm.cli.progress import Bar
from jax_ddpm.io.files import replacing
from jax_ddpm.runs import Run, draw, save_grid
from jax_ddpm.runs.drawing import labels_in_turn, make_chain
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.hosts import on_writer, together

__all__ = ["sample"]


def sample(config: SampleConfig) -> None:
    """Draw as `config` says and write the images."""
    check_positive(num=config.num, batch_size=config.batch_size, steps=config.steps)
    check_file("--out", config.out, ".png", ".npz")
    sampler = make_sampler(config)
    start_devices(config.devices)
    run, chain, labels = together(lambda: _prepare(config))
    with Bar("sampling") as bar:
        samples = draw(
            jax.random.key(config.seed),
            run,
            config.num,
            labels=labels,
            chain=chain,
            sampler=sampler,
            batch_size=config.batch_size,
            progress=bar,
        )
    on_writer(lambda: _write(config, run, samples, labels))
    steps = f"{chain.num_timesteps} {config.sampler} steps"
    say(f"wrote {config.out}: {config.num} images, {steps} each")


def _prepare(config: SampleConfig) -> tuple[Run, NoiseSchedule, np.ndarray | None]:
    run = load_chain(config)
    with naming(labels="--label"):
        labels = labels_in_turn(run, config.num, config.label or None)
    return run, make_chain(run, config.steps), labels


def _write(config: SampleConfig, run: Run, samples: np.ndarray, labels: np.ndarray | None) -> None:
    with writing("--out", config.out), replacing(config.out) as file:
        if config.out.suffix == ".png":
            columns = run.class_columns
            if config.label:
                columns = len(config.label) if 1 < len(config.label) <= 16 else None
            save_grid(file, samples, columns=columns)
        else:
            arrays: dict[str, Any] = {"samples": samples}
            if labels is not None:
                arrays["labels"] = labels
            np.savez(file, **arrays)
