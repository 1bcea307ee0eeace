"""The devices of a command: every one of every host, and a cache of what was compiled for them."""

import sys
from pathlib import Path
from typing import Any

import jax
from jax.experimental.multihost_utils import sync_global_devices

from jax_ddpm.cli.config import DevicesConfig
from jax_ddpm.cli.errors import UsageError
from jax_ddpm.cpu import use_cores
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
    if "://" not in cache:
        try:
            folder = Path(cache).expanduser()
            folder.mkdir(parents=True, exist_ok=True)
        except (OSError, RuntimeError) as error:
            if cache == DevicesConfig.compilation_cache:
                return  # nobody asked for it
            raise UsageError(f"--compilation-cache: cannot write it: {error}") from None
        cache = str(folder)
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_writer():
        print(line, flush=True)
