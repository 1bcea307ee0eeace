"""The devices of a command: every one of every host, and a cache of what was compiled for them."""

import sys
from pathlib import Path
from typing import Any

import jax

from jax_ddpm.cli.config import DevicesConfig, UsageError
from jax_ddpm.cpu import use_cores
from jax_ddpm.training.hosts import any_process, connect, is_writer

__all__ = ["say", "start_devices"]


def start_devices(config: DevicesConfig) -> None:
    """Call before JAX's first use."""
    if config.coordinator is not None:
        process = f"process {config.process_id} of {config.num_processes}"
        print(f"{process}: waiting for the others at {config.coordinator}", file=sys.stderr)
    try:
        connect(config.coordinator, config.num_processes, config.process_id)
    except (ValueError, RuntimeError) as error:
        message = str(error).partition("\n")[0]
        problem = message.partition(": ")[2] or message
        raise UsageError(f"--coordinator, --num-processes, --process-id: {problem}") from None
    use_cores()
    # Processes may have no more than 30 s to form a group, so they do now, before loading.
    any_process(False)
    settings: Any = jax.config
    if config.compilation_cache is not None and settings.jax_compilation_cache_dir is None:
        cache = config.compilation_cache
        if "://" not in cache:
            try:
                cache = Path(cache).expanduser()
                cache.mkdir(parents=True, exist_ok=True)
            except (OSError, RuntimeError) as error:
                if config.compilation_cache == DevicesConfig.compilation_cache:
                    return  # nobody asked for it
                raise UsageError(f"--compilation-cache: cannot write it: {error}") from None
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def say(line: str) -> None:
    """Print a line, once for all processes."""
    if is_writer():
        print(line, flush=True)
