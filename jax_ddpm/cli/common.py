"""What commands have in common: devices, images, and a model with its chain."""

import sys
from inspect import signature
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from jax_ddpm.cli.config import ChainConfig, DataConfig, DevicesConfig
from jax_ddpm.cli.errors import UsageError, naming
from jax_ddpm.cli.terminal import bars
from jax_ddpm.cpu import use_cores
from jax_ddpm.data import Dataset, Preparation, load_dataset
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.runs import Progress, load_model, load_run
from jax_ddpm.runs.drawing import with_guidance
from jax_ddpm.runs.model import is_run
from jax_ddpm.samplers import SAMPLERS, Sampler
from jax_ddpm.training.hosts import connect, is_writer


def start_devices(config: DevicesConfig) -> None:
    """Call before JAX's first use."""
    if config.coordinator is not None:
        process = f"process {config.process_id} of {config.num_processes}"
        print(f"{process}: waiting for the others at {config.coordinator}", file=sys.stderr)
    connect(config.coordinator, config.num_processes, config.process_id)
    use_cores()
    # Processes may have no more than 30 s to form a group, so they do now, before loading.
    sync_global_devices("started")
    settings: Any = jax.config
    cache = config.compilation_cache
    if cache.lower() == "none" or settings.jax_compilation_cache_dir is not None:
        return
    try:
        if "://" not in cache:
            folder = Path(cache).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
            cache = str(folder)
    except (OSError, RuntimeError) as error:
        if cache == DevicesConfig.compilation_cache:
            return  # nobody asked for it
        raise UsageError(f"--compilation-cache: cannot write it: {error}") from None
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_writer():
        print(line, flush=True)


def load_images(config: DataConfig, preparation: Preparation) -> Dataset:
    """Read the images under a bar."""
    if config.data is not None and config.dataset is not None:
        raise UsageError("expected one of --data and --dataset, got both")
    with bars() as show:
        return load_dataset(
            config.source,
            preparation,
            cache=config.data_cache,
            progress=lambda what, done, total: show(Progress(done, total, what=what)),
        )


def make_sampler(config: ChainConfig) -> Sampler:
    """The rule of `--sampler` with its options. Raises `UsageError` for those of another rule."""
    given = {name: getattr(config, name) for name in ("eta", "order", "stochastic")}
    given = {k: value for k, value in given.items() if value is not None and value is not False}
    for name in given:
        owners = [each for each, rule in SAMPLERS.items() if name in signature(rule).parameters]
        if config.sampler not in owners:
            raise UsageError(f"--{name}: needs --sampler {' or '.join(owners)}")
    return SAMPLERS[config.sampler](**given)


def load_chain(config: ChainConfig) -> DiffusionModel:
    """The model under its guidance, with its spacing."""
    if (config.run is None) == (config.pretrained is None):
        raise UsageError("expected --run or --pretrained, and one of them only")
    others = {name: getattr(config, name) for name in ("openai_flags", "revision", "variant")}
    if config.run is not None:
        for name, value in others.items():
            if value is not None:
                raise UsageError(f"--{name.replace('_', '-')}: comes with --pretrained")
        with naming(folder="--run"):
            run = load_run(config.run, checkpoint=config.checkpoint)
    else:
        if config.checkpoint is not None:
            raise UsageError("--checkpoint: comes with --run")
        assert config.pretrained is not None
        if is_run(config.pretrained):
            raise UsageError(f"--pretrained: {config.pretrained} is a run, for --run")
        with naming(folder="--pretrained"):
            run = load_model(config.pretrained, **others)
    run = with_guidance(run, config.guidance)
    return run if config.spacing is None else run._replace(timestep_spacing=config.spacing)
