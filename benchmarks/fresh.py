"""One measurement in a process of its own: `python -m benchmarks.fresh WHAT ARGUMENTS…`.

memory SIDE BATCH STEPS     peak memory that sampling adds to a process, in bytes
attention SIDE PASS         peak memory that attention over 64×64 tokens adds, in bytes
start  RUN CACHE            seconds of `jax-ddpm sample` from the first import to 16 pictures
"""

import ctypes
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

__all__ = ["attention", "memory", "start"]


def memory(side: str, batch: str, steps: str) -> dict[str, float]:
    """What sampling adds to the resident memory at its highest, beyond the imported library.

    Run twice, so that what is compiled or tuned is there: the second is counted from the same
    floor, weights and program included. What the first has freed, and glibc keeps, goes back to
    the system between them: it is no longer in use, and differs from run to run.
    """
    size, count = int(batch), int(steps)
    run = _jax_sampler(size, count) if side == "jax" else _torch_sampler(size, count, side)
    return {"bytes": _added(run)}


def attention(side: str, part: str) -> dict[str, float]:
    """The same of one image's attention, 8 heads of 64 channels, `"forward"` or `"gradient"`."""
    heads = np.random.default_rng(0).standard_normal((3, 1, 64 * 64, 8, 64), np.float32)
    run = {"jax": _jax_attention, "torch": _torch_attention}[side](heads, part == "gradient")
    return {"bytes": _added(run)}


def _added(run: Callable[[], object]) -> int:
    floor = _resident()
    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return _peak() - floor


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


def _jax_attention(heads: np.ndarray, gradient: bool):
    import jax

    from jax_ddpm.models.attention import dot_product_attention

    def attend(query, key, value):
        return dot_product_attention(query, key, value, precision="highest")

    def summed(*heads):
        return attend(*heads).sum()

    arrays = [jax.device_put(each) for each in heads]
    program = jax.jit(jax.grad(summed, (0, 1, 2)) if gradient else attend).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays))


def _torch_attention(heads: np.ndarray, gradient: bool):
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    query, key, value = (
        torch.from_numpy(each).transpose(1, 2).requires_grad_(gradient) for each in heads
    )

    def run():
        out = scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(out.sum(), (query, key, value)) if gradient else out

    return run


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
    print(json.dumps({"attention": attention, "memory": memory, "start": start}[what](*arguments)))
