"""`jax-ddpm sample`: images from a trained run."""

import os

import jax
import numpy as np

from jax_ddpm.cli.config import SampleConfig, UsageError, positive
from jax_ddpm.cli.draw import draw_samples
from jax_ddpm.cli.figures import save_grid
from jax_ddpm.cli.runs import load_run
from jax_ddpm.samplers import ancestral, ddim
from jax_ddpm.schedule import respace, spaced_timesteps
from jax_ddpm.training.sharding import use_cpu_cores

__all__ = ["sample"]


def sample(config: SampleConfig) -> None:
    """Draw as `config` says and write the images."""
    positive(config, "num", "steps", "batch_size")
    if config.out.suffix not in (".png", ".npz"):
        raise UsageError(f"--out: expected a .png or a .npz, got {config.out}")
    if not config.out.parent.is_dir():
        raise UsageError(f"--out: no such folder: {config.out.parent}")
    use_cpu_cores(collectives=False)
    run = load_run(config.run)
    timesteps = run.schedule.num_timesteps
    if config.steps > timesteps:
        raise UsageError(
            f"--steps: expected at most {timesteps}, the run's timesteps, got {config.steps}"
        )
    kept = spaced_timesteps(timesteps, config.steps, config.spacing)
    samples = draw_samples(
        jax.random.key(config.seed),
        respace(run.schedule, kept),
        run.model.apply,
        run.variables,
        config.num,
        run.image_shape,
        {"ddim": ddim, "ancestral": ancestral}[config.sampler](),
        batch_size=config.batch_size,
    )
    temporary = config.out.with_name(f".{config.out.stem}.tmp{config.out.suffix}")
    if config.out.suffix == ".png":
        save_grid(temporary, samples)
    else:
        np.savez(temporary, samples=samples)
    os.replace(temporary, config.out)
    print(f"wrote {config.out}: {config.num} images, {config.steps} {config.sampler} steps each")
