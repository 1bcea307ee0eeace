"""`jax-ddpm sample`: images from a trained run or a diffusers checkpoint."""

import numpy as np

from jax_ddpm._errors import check_positive
from jax_ddpm._table import counted
from jax_ddpm.cli.common import load_chain, make_sampler, say, start_devices
from jax_ddpm.cli.config import SampleConfig
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.cli.terminal import bars
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.noise import seed_key
from jax_ddpm.runs import draw, save_samples
from jax_ddpm.runs.drawing import labels_in_turn, make_chain
from jax_ddpm.runs.figures import class_columns
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.hosts import run_on_all, run_on_writer


def sample(config: SampleConfig) -> None:
    """Draw as `config` says and write the images."""
    check_positive(num=config.num, batch_size=config.batch_size, steps=config.steps)
    if config.out.suffix or config.out.is_file():
        check_file("--out", config.out, ".png", ".npz")
    elif config.out.is_dir() and any(config.out.iterdir()):
        raise UsageError(f"--out: expected a new or empty folder, got {config.out}")
    sampler = make_sampler(config)
    start_devices(config.devices)
    key = seed_key(config.seed)
    run, chain, labels = run_on_all(lambda: _prepare(config))
    labels = labels if run.drawn or config.label else None  # the null label is no class
    with bars() as show:
        samples = draw(
            key,
            run,
            config.num,
            labels=config.label or None,
            chain=chain,
            sampler=sampler,
            batch_size=config.batch_size,
            progress=show,
        )
    columns, titles = class_columns(run)
    if config.label:
        several = 1 < len(config.label) <= 16
        columns, titles = (len(config.label), config.label) if several else (None, None)
    with writing("--out", config.out), naming(path="--out", images="samples"):
        run_on_writer(
            lambda: save_samples(config.out, samples, labels, columns, titles, run.class_names)
        )
    steps = counted(chain.num_timesteps, f"{config.sampler} step")
    say(f"wrote {config.out}: {counted(config.num, 'image')}, {steps} each")


def _prepare(config: SampleConfig) -> tuple[DiffusionModel, NoiseSchedule, np.ndarray | None]:
    run = load_chain(config)
    with naming(labels="--label"):
        labels = labels_in_turn(run, config.num, config.label or None)
    return run, make_chain(run, config.steps), labels
