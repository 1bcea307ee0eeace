"""What the compiled loop costs against the length of the chain: nothing but time."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

import jax_ddpm as ddpm
from benchmarks import contenders as sides
from benchmarks.settings import Settings
from benchmarks.timing import timed

__all__ = ["run"]


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Compile the tutorial's loop at batch 4 for each T."""
    rows = []
    for timesteps in settings.chain_lengths:
        rows.append(_compile(settings, timesteps))
        log(f"program for T = {timesteps:,}: {rows[-1]['compile_s']:.1f} s to compile")
    return rows


def _compile(settings: Settings, timesteps: int) -> dict[str, Any]:
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(timesteps))
    shape = (4, *sides.TUTORIAL.image_shape)

    def loop(key, variables):
        denoise_fn = partial(sides.TUTORIAL.apply_fn, variables)
        return ddpm.p_sample_loop(key, schedule, denoise_fn, shape)

    arguments = jax.random.key(0), sides.TUTORIAL.variables()
    program, seconds = timed(lambda: jax.jit(loop).lower(*arguments).compile())
    memory = program.memory_analysis()
    assert memory is not None
    return {
        "timesteps": timesteps,
        "compile_s": seconds,
        "program_lines": len((program.as_text() or "").splitlines()),
        "temporary_bytes": memory.temp_size_in_bytes,
    }
