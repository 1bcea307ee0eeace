"""What only new processes show: peak memory, the time to the first pictures, and resuming.

JAX and torch are imported inside the functions: `_start` times its imports.
"""

import ctypes
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Row, in_new_process, resident_bytes, say

_BATCH, _STEPS = 16, 4


def processes(full: bool) -> list[Row]:
    """The memory that sampling and attention add, the start, opening a checkpoint; Linux only."""
    from benchmarks.contenders import JAX_SHARDED, torch_contenders

    times, rows = 3 if full else 1, []
    memory, names = f"memory of sampling {_BATCH} images", (JAX_SHARDED, *torch_contenders())
    work = [(memory, name, _sampling, name) for name in names]
    for part in ("forward", "gradient"):
        what, torchs = f"memory of attention, {part}", "torch's scaled_dot_product_attention"
        work += [(what, "JAX jit", _jax_attention, part), (what, torchs, _torch_attention, part)]
    for what, name, function, argument in work:
        say(f"{what}, {name} …")
        found = [in_new_process(function, argument) for _ in range(times)]
        rows.append({"what": what, "contender": name, "bytes": found})
    with tempfile.TemporaryDirectory() as folder:
        say("time to the first picture, and to open a checkpoint …")
        in_new_process(_write, folder)
        for number in range(times):
            for name in ("cold", "cache warm"):
                seconds = in_new_process(_start, folder, f"{folder}/cache{number}")
                rows.append({"what": "start", "contender": name, **seconds})
            for name in ("JAX", "diffusers"):
                seconds = in_new_process(_open, name, f"{folder}/celebahq")
                rows.append({"what": "opening", "contender": name, **seconds})
    return rows


def _sampling(name: str) -> int:
    from benchmarks import contenders as sides
    from jax_ddpm.cpu import use_cores

    if name == sides.JAX_SHARDED:
        use_cores()
        return _added(sides.jax_loop(sides.TUTORIAL, _STEPS, _BATCH, sides.over_cores(_BATCH)).run)
    side = sides.torch_contenders()[name]
    return _added(sides.torch_loop(sides.TUTORIAL, _STEPS, _BATCH, *side).run)


def _jax_attention(part: str) -> int:
    import jax

    from jax_ddpm.models.attention import dot_product_attention

    def attend(query, key, value):
        return dot_product_attention(query, key, value, precision="highest")

    function: Any = attend
    if part == "gradient":
        function = jax.grad(lambda *heads: attend(*heads).sum(), (0, 1, 2))
    arrays = [jax.device_put(each) for each in _heads()]
    program = jax.jit(function).lower(*arrays).compile()
    return _added(lambda: jax.block_until_ready(program(*arrays)))


def _torch_attention(part: str) -> int:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    gradient = part == "gradient"
    query, key, value = (
        torch.from_numpy(each).transpose(1, 2).requires_grad_(gradient) for each in _heads()
    )

    def run():
        out = scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(out.sum(), (query, key, value)) if gradient else out

    return _added(run)


def _heads() -> np.ndarray:
    """Query, key and value of one image: 64×64 tokens, 8 heads of 64 channels."""
    return np.random.default_rng(0).standard_normal((3, 1, 64 * 64, 8, 64), np.float32)


def _added(run: Callable[[], object]) -> int:
    """What `run` adds to the resident memory at its highest.

    It runs twice, so that what is compiled or tuned is there: the second is counted from the same
    floor, weights and program included. What the first has freed, and glibc keeps, goes back to
    the system between them: it is no longer in use, and differs from run to run.
    """
    floor = resident_bytes("VmRSS")
    run()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    run()
    return resident_bytes("VmHWM") - floor


def _write(folder: str) -> None:
    """A run on the digits, and google's ddpm-celebahq-256 (114 million parameters) with random
    weights in safetensors."""
    import jax

    import jax_ddpm as ddpm
    from jax_ddpm.data import load_dataset
    from jax_ddpm.interop import DiffusionModel, save_diffusers
    from jax_ddpm.interop.model import init_variables
    from jax_ddpm.runs import Settings, fit

    fit(f"{folder}/run", load_dataset("digits"), Settings(steps=1))
    model, random, shape = ddpm.ddpm_celebahq(), np.random.default_rng(0), (256, 256, 3)
    shapes = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))
    weights = jax.tree.map(lambda leaf: random.standard_normal(leaf.shape, np.float32), shapes)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
    save_diffusers(f"{folder}/celebahq", DiffusionModel(model, weights, schedule, shape))


def _start(folder: str, cache: str) -> dict[str, float]:
    """Seconds of `jax-ddpm sample` to 16 pictures, the imports apart."""
    before = time.perf_counter()
    import jax_ddpm.runs  # noqa: F401, since the command imports it only when it runs
    from jax_ddpm import cli

    imported = time.perf_counter()
    os.makedirs(cache, exist_ok=True)
    flags = ["--num", "16", "--out", f"{cache}/samples.npz", "--compilation-cache", cache]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        cli.run(["sample", "--run", f"{folder}/run", *flags])
    return {"imports": imported - before, "pictures": time.perf_counter() - imported}


def _open(side: str, folder: str) -> dict[str, float]:
    """Seconds until the network is there, until each weight was read (summed), and the memory."""
    import jax
    from diffusers.models.unets.unet_2d import UNet2DModel

    from jax_ddpm.interop import load_diffusers

    before, start = resident_bytes("VmHWM"), time.perf_counter()
    if side == "JAX":
        weights = jax.tree.leaves(load_diffusers(folder).variables)
    else:
        weights = list(UNet2DModel.from_pretrained(f"{folder}/unet").parameters())
    opened = time.perf_counter() - start
    for each in weights:
        each.sum()
    read, memory = time.perf_counter() - start, resident_bytes("VmHWM") - before
    return {"open_s": opened, "read_s": read, "bytes": memory}


def check_resuming() -> Row:
    """Training that was stopped and resumed, against training that was not: equal to the bit?

    One process takes k steps, saves, and takes k more. A new process restores what was saved and
    takes the last k again. Call before JAX's backend starts: a TPU serves one process at a time.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole = in_new_process(_train, folder, False)
        resumed = in_new_process(_train, folder, True)
    wrong = [name for name in whole if whole[name].tobytes() != resumed[name].tobytes()]
    row = {"name": "training, saved and resumed at half", "arrays": len(whole)}
    return {**row, "differing": ", ".join(wrong), "status": "failed" if wrong else "passed"}


def _train(folder: str, resume: bool) -> dict[str, np.ndarray]:
    """The arrays of a state after the whole training, or after its resumed second half."""
    # Otherwise a GPU adds sums up in whatever order its threads come.
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_deterministic_ops=true"
    import jax
    import optax

    import jax_ddpm as ddpm
    from jax_ddpm.io.arrays import flatten
    from jax_ddpm.runs import load_state, save_state

    # A program from the cache would be the other process's.
    jax.config.update("jax_enable_compilation_cache", False)
    # Group norms and attention too, whose sums are the ones that threads share.
    model, shape, half = ddpm.ddpm_digits(num_classes=None), (16, 16, 16, 1), 5
    schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(200))
    optimizer = optax.adam(1e-3)

    def images(number: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal(shape, np.float32)

    variables = jax.jit(model.init)(jax.random.key(0), images(0), np.zeros(shape[0], np.int32))
    state = ddpm.init_train_state(jax.random.key(1), variables, optimizer)
    step = jax.jit(ddpm.make_train_step(schedule, model.apply, optimizer, ema_decay=0.9))
    if resume:
        state = load_state(f"{folder}/{half:08}", state)
    for number in range(int(state.step), 2 * half):
        if number == half and not resume:
            save_state(folder, state)
        state, _ = step(state, images(number))
    arrays: Any = state._replace(key=jax.random.key_data(state.key))
    return {name: np.asarray(leaf) for name, leaf in flatten(arrays).items()}
