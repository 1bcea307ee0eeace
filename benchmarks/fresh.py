"""One measurement in a process of its own: `python -m benchmarks.fresh WHAT ARGUMENTS…`.

memory SIDE BATCH STEPS     peak memory that sampling adds to a process, in bytes
start  RUN CACHE            seconds of `jax-ddpm sample` from the first import to 16 pictures
"""

import ctypes
import json
import sys
import time
from functools import partial
from pathlib import Path

__all__ = ["memory", "start"]


def memory(side: str, batch: str, steps: str) -> dict[str, float]:
    """What sampling adds to the resident memory at its highest, beyond the imported library.

    Run twice, so that what is compiled or tuned is there: the second is counted from the same
    floor, weights and program included. What the first has freed, and glibc keeps, goes back to
    the system between them: it is no longer in use, and differs from run to run.
    """
    size, count = int(batch), int(steps)
    if side == "jax":
        run = _jax_sampler(size, count)
    else:
        run = _torch_sampler(size, count, side)
    floor = _resident()
    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return {"bytes": _peak() - floor}


def start(folder: str, cache: str) -> dict[str, float]:
    """Imports apart from the rest, as `jax-ddpm sample` does it."""
    before = time.perf_counter()
    from jax_ddpm.cli.config import DevicesConfig, SampleConfig
    from jax_ddpm.cli.sample import sample

    imported = time.perf_counter()
    devices = DevicesConfig(compilation_cache=cache)
    out = Path(cache) / "samples.npz"
    sample(SampleConfig(run=Path(folder), num=16, out=out, devices=devices))
    return {"imports": imported - before, "pictures": time.perf_counter() - imported}


def _jax_sampler(batch: int, steps: int):
    from jax_ddpm.cpu import use_cores

    use_cores()
    import jax

    import jax_ddpm as ddpm
    from benchmarks import contenders as sides

    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
    schedule = ddpm.respace(schedule, range(steps))
    sharding = list(sides.jax_contenders(batch).values())[-1]
    shape = (batch, *sides.TUTORIAL.image_shape)
    return sides.jax_loop(jax.random.key(0), sides.TUTORIAL, schedule, shape, sharding)


def _torch_sampler(batch: int, steps: int, side: str):
    from benchmarks import contenders as sides
    from benchmarks.sampling import torch_run, torch_step

    channels_last, wrap = sides.torch_contenders()[side]
    step = wrap(torch_step(sides.TUTORIAL.torch_module(channels_last)))
    return partial(torch_run, step, batch, channels_last, steps)


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise LookupError(field)


_resident = partial(_status, "VmRSS")
_peak = partial(_status, "VmHWM")


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps({"memory": memory, "start": start}[what](*arguments)))
