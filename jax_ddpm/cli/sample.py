"""`jax-ddpm sample`: images from a trained run or a diffusers checkpoint."""

from typing import Any

import jax
import numpy as np

from jax_ddpm.cli.config import (
    ChainConfig,
    SampleConfig,
    UsageError,
    check_out,
    naming,
    positive,
    writing,
)
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.draw import class_columns, cycle_labels, draw_samples
from jax_ddpm.cli.figures import save_grid
from jax_ddpm.cli.runs import Run, load_pretrained, load_run
from jax_ddpm.io.files import replacing
from jax_ddpm.samplers import Sampler, ancestral, ddim, dpm_solver_pp, heun
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.hosts import on_writer, together

__all__ = ["SAMPLERS", "guided", "load_chain", "make_sampler", "sample"]

_STEPS = 50
SAMPLERS = {"ancestral": ancestral, "ddim": ddim, "dpm_solver_pp": dpm_solver_pp, "heun": heun}
_OPTIONS = {"eta": "ddim", "order": "dpm_solver_pp", "stochastic": "dpm_solver_pp"}


def sample(config: SampleConfig) -> None:
    """Draw as `config` says and write the images."""
    positive(config, "num", "batch_size")
    check_out(config.out, ".png", ".npz")
    make_sampler(config)  # refuses before the work
    start_devices(config.devices)
    run, chain, labels = together(lambda: _prepare(config))
    samples = draw_samples(
        jax.random.key(config.seed),
        run,
        chain,
        config.num,
        make_sampler(config),
        labels=labels,
        batch_size=config.batch_size,
    )
    on_writer(lambda: _write(config, run, samples, labels))
    steps = f"{chain.num_timesteps} {config.sampler} steps"
    say(f"wrote {config.out}: {config.num} images, {steps} each")


def _prepare(config: SampleConfig) -> tuple[Run, NoiseSchedule, np.ndarray | None]:
    run, chain = load_chain(config)
    return run, chain, _labels(config, run)


def _write(config: SampleConfig, run: Run, samples: np.ndarray, labels: np.ndarray | None) -> None:
    with writing("--out", config.out), replacing(config.out) as file:
        if config.out.suffix == ".png":
            columns = class_columns(run)
            if config.label:
                columns = len(config.label) if 1 < len(config.label) <= 16 else None
            save_grid(file, samples, columns=columns)
        else:
            arrays: dict[str, Any] = {"samples": samples}
            if labels is not None:
                arrays["labels"] = labels
            np.savez(file, **arrays)


def make_sampler(config: ChainConfig) -> Sampler:
    """The rule of `--sampler`, with its options. Raises `UsageError` for those of another rule."""
    options = {}
    for name, owner in _OPTIONS.items():
        value = getattr(config, name)
        if value is None or value is False:
            continue
        if owner != config.sampler:
            raise UsageError(f"--{name}: comes with --sampler {owner}")
        options[name] = value
    try:
        return SAMPLERS[config.sampler](**options)
    except ValueError as error:
        raise UsageError(f"--{error}") from None


def load_chain(config: ChainConfig) -> tuple[Run, NoiseSchedule]:
    """The model under its guidance, with its spacing, and the chain of `--steps`."""
    positive(config, "steps")
    run = _load(config)
    timesteps = run.pretrained.schedule.num_timesteps
    steps = config.steps or min(_STEPS, timesteps)
    if steps > timesteps:
        raise UsageError(
            f"--steps: expected at most {timesteps}, the model's timesteps, got {steps}"
        )
    if config.spacing is not None:
        run = run._replace(pretrained=run.pretrained._replace(timestep_spacing=config.spacing))
    return run, run.pretrained.chain(steps)


def _load(config: ChainConfig) -> Run:
    if config.run is not None and config.pretrained is None:
        with naming("--run"):
            run = load_run(config.run, step=config.checkpoint)
    elif config.pretrained is not None and config.run is None:
        if config.checkpoint is not None:
            raise UsageError("--checkpoint: comes with --run")
        with naming("--pretrained"):
            run = load_pretrained(config.pretrained)
    else:
        raise UsageError("expected --run or --pretrained, and one of them only")
    return guided(run, config.guidance)


def guided(run: Run, guidance: float | None) -> Run:
    """The run with `--guidance`, if it is given."""
    if guidance is None or guidance == run.guidance:
        return run
    if not run.null_label:
        raise UsageError("--guidance: the model has no classes, or no label that stands for none")
    # A checkpoint does not say which label stands for none: it is the last, if it is guided.
    return run._replace(guidance=guidance, num_classes=run.null_label)


def _labels(config: SampleConfig, run: Run) -> np.ndarray | None:
    if not config.label:
        return cycle_labels(run, config.num)
    if run.num_classes is None:
        raise UsageError("--label: the model has no classes")
    for label in config.label:
        if not 0 <= label < run.num_classes:
            raise UsageError(f"--label: expected 0 to {run.num_classes - 1}, got {label}")
    return np.resize(np.asarray(config.label, np.int32), config.num)
