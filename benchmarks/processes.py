"""What only new processes show: peak memory, the time to the first pictures, and resuming.

`python -m benchmarks.processes WHAT ARGUMENTS…` is one of them; its last line is JSON:

    memory SIDE BATCH STEPS     peak memory that sampling adds to a process, in bytes
    attention SIDE PASS         peak memory that attention over 64×64 tokens adds, in bytes
    start RUN CACHE             seconds of `jax-ddpm sample` from the first import to 16 pictures
    resume PART FOLDER SIZE     training, whole or resumed; its arrays are left in the folder

JAX and torch are imported inside the functions: `start` times its imports.
"""

import ctypes
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Log, Row, Settings, available, resident_bytes

__all__ = ["check_resuming", "differing", "processes"]

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_BATCH, _STEPS = 16, 4
_CHECKPOINT, _NPZ = "jax_ddpm.io.checkpoint", ".npz, since safetensors is missing"
_ROOT = Path(__file__).parents[1]


def processes(settings: Settings, log: Log = print) -> list[Row]:
    """What sampling and attention add to the memory, and the start; Linux only."""
    from benchmarks.contenders import JAX_SHARDED, torch_contenders

    def peaks(*arguments: str) -> list[int]:
        return [_new(*arguments)["bytes"] for _ in range(settings.processes)]

    rows: list[Row] = []
    for name, side in {JAX_SHARDED: "jax", **{name: name for name in torch_contenders()}}.items():
        log(f"peak memory: {name} …")
        found = peaks("memory", side, str(_BATCH), str(_STEPS))
        rows.append({"what": "memory", "contender": name, "batch": _BATCH, "bytes": found})
    for side, name in {"jax": "JAX jit", "torch": "torch's scaled_dot_product_attention"}.items():
        for part in ("forward", "gradient"):
            log(f"memory of attention: {name}, {part} …")
            row = {"what": "attention", "side": side, "contender": name, "pass": part}
            rows.append({**row, "bytes": peaks("attention", side, part)})
    with tempfile.TemporaryDirectory() as folder:
        _write_run(Path(folder) / "run")
        log("time to the first picture …")
        for number in range(settings.processes):
            cache = Path(folder) / f"cache{number}"
            cache.mkdir()
            for name in ("cold", "cache warm"):
                seconds = _new("start", f"{folder}/run", str(cache))
                rows.append({"what": "start", "contender": name, **seconds})
    return rows


def check_resuming(*, tiny: bool) -> list[Row]:
    """Training that was stopped and resumed, against training that was not: equal to the bit?

    One process takes k steps, saves, and takes k more. A new process restores what was saved and
    takes the last k steps again. Each compiles for itself. On a GPU both run under
    `--xla_gpu_deterministic_ops=true`: otherwise sums are added up in whatever order threads come.
    Call before this process starts JAX's backend: a TPU serves one process at a time.
    """
    new = partial(_new, timeout=150.0)
    backend = new("backend")["backend"]
    flags = DETERMINISTIC if backend == "gpu" else ""
    with tempfile.TemporaryDirectory() as folder:
        size = "tiny" if tiny else "full"
        whole = new("resume", "whole", folder, size, flags=flags)
        new("resume", "resumed", folder, size, flags=flags)
        ours, theirs = (_read(Path(folder) / f"{part}.npz") for part in ("resumed", "whole"))
    wrong = differing(ours, theirs)
    row: Row = {
        "part": "resume",
        "name": f"{whole['network']}: {whole['steps']} steps, saved and resumed at half",
        "saved_with": whole["saved_with"],
        "xla_flags": whole["xla_flags"],
        "arrays": len(theirs),
        "differing": wrong,
        "status": "failed" if wrong else "passed",
    }
    if wrong:
        shown = ", ".join(wrong[:3])
        row["problem"] = f"{len(wrong)} of {len(theirs)} arrays differ: {shown}"
    return [row]


def differing(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> list[str]:
    """The names whose arrays are not the same to the bit; NaN equals the same NaN."""

    def bits(array: np.ndarray | None) -> Any:
        return None if array is None else (array.dtype, array.shape, array.tobytes())

    names = sorted(ours.keys() | theirs.keys())
    return [name for name in names if bits(ours.get(name)) != bits(theirs.get(name))]


def _new(*arguments: str, flags: str = "", timeout: float | None = None) -> dict[str, Any]:
    """Run this file in a new process, `flags` for XLA; what it says of itself."""
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if flags:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.processes", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if result.returncode:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"{' '.join(arguments)}: exit code {result.returncode}: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def _write_run(folder: Path) -> None:
    import jax

    from jax_ddpm.interop import DiffusionModel
    from jax_ddpm.interop.model import init_variables
    from jax_ddpm.models import ddpm_digits
    from jax_ddpm.runs.model import save_run
    from jax_ddpm.runs.settings import named_schedule

    model, shape = ddpm_digits(), (8, 8, 1)
    variables = jax.device_get(init_variables(model, jax.random.key(0), shape))
    classes = {"num_classes": 10, "null_label": 10, "guidance": 2.0}
    save_run(
        folder, DiffusionModel(model, variables, named_schedule("cosine", 200), shape, **classes)
    )


def _start(folder: str, cache: str) -> dict[str, float]:
    """Imports apart from the rest, as `jax-ddpm sample` does it."""
    before = time.perf_counter()
    import jax_ddpm.runs  # noqa: F401, since the command imports it only when it runs
    from jax_ddpm import cli

    imported = time.perf_counter()
    out = f"{cache}/samples.npz"
    cli.run(["sample", "--run", folder, "--num", "16", "--out", out, "--compilation-cache", cache])
    return {"imports": imported - before, "pictures": time.perf_counter() - imported}


def _memory(side: str, batch: str, steps: str) -> dict[str, int]:
    """What sampling adds to the resident memory at its highest, beyond the imported library."""
    from benchmarks import contenders as sides
    from benchmarks.networks import TUTORIAL
    from jax_ddpm.cpu import use_cores

    size, count = int(batch), int(steps)
    width, *_ = TUTORIAL.image_shape
    if side == "jax":
        use_cores()
        sharding = list(sides.jax_contenders(size).values())[-1]
        shape = (size, *TUTORIAL.image_shape)
        return _added(sides.jax_loop(TUTORIAL, sides.chain(count), shape, sharding))
    channels_last, wrap = sides.torch_contenders()[side]
    step = wrap(sides.torch_step(TUTORIAL.torch_module(channels_last)))
    draw = lambda _: sides.draw(size, width, channels_last)  # noqa: E731
    return _added(lambda: sides.torch_loop(step, draw, count))


def _attention(side: str, part: str) -> dict[str, int]:
    """The same of one image's attention, 8 heads of 64 channels, `"forward"` or `"gradient"`."""
    heads = np.random.default_rng(0).standard_normal((3, 1, 64 * 64, 8, 64), np.float32)
    return _added({"jax": _jax_attention, "torch": _torch_attention}[side](heads, part))


def _jax_attention(heads: np.ndarray, part: str) -> Callable[[], object]:
    import jax

    from jax_ddpm.models.attention import dot_product_attention

    def attend(query, key, value):
        return dot_product_attention(query, key, value, precision="highest")

    def summed(*heads):
        return attend(*heads).sum()

    arrays = [jax.device_put(each) for each in heads]
    function = jax.grad(summed, (0, 1, 2)) if part == "gradient" else attend
    program = jax.jit(function).lower(*arrays).compile()
    return lambda: jax.block_until_ready(program(*arrays))


def _torch_attention(heads: np.ndarray, part: str) -> Callable[[], object]:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    gradient = part == "gradient"
    query, key, value = (
        torch.from_numpy(each).transpose(1, 2).requires_grad_(gradient) for each in heads
    )

    def run():
        out = scaled_dot_product_attention(query, key, value)
        return torch.autograd.grad(out.sum(), (query, key, value)) if gradient else out

    return run


def _added(run: Callable[[], object]) -> dict[str, int]:
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
    return {"bytes": resident_bytes("VmHWM") - floor}


def _backend() -> dict[str, str]:
    import jax

    return {"backend": jax.default_backend()}


def _resume(part: str, folder: str, size: str) -> dict[str, Any]:
    """The training, whole or from what the whole one saved at half."""
    import jax

    # A program that was kept would be the other process's.
    jax.config.update("jax_enable_compilation_cache", False)
    step, state, images, half, network = _training(tiny=size == "tiny")
    path, first = Path(folder), 0
    if part == "resumed":
        state, first = _load(path, state), half
    for number in range(first, 2 * half):
        if part == "whole" and number == half:
            _save(path, half, state)
        state, _ = step(state, images(number))
    _write(path / f"{part}.npz", _arrays(state))
    return {
        "network": network,
        "steps": 2 * half,
        "saved_with": _CHECKPOINT if available("safetensors") else _NPZ,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def _training(*, tiny: bool) -> tuple[Any, Any, Any, int, str]:
    """A jitted step, its first state, the batch of each step, how many steps are half, a name."""
    import jax
    import optax

    import jax_ddpm as ddpm

    model: Any = ddpm.SimpleUNet()
    name, shape, half = "SimpleUNet", (2, 8, 8, 3), 2
    if not tiny:
        # Group norms and attention too, whose sums are the ones that threads share.
        model = ddpm.ddpm_digits(num_classes=None, in_channels=3, out_channels=3)
        name, shape, half = "a U-Net of ddpm_digits' size", (16, 32, 32, 3), 5
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
    optimizer = optax.adam(1e-3)

    def images(number: int) -> np.ndarray:
        return np.random.default_rng(number).standard_normal(shape, np.float32)

    variables = jax.jit(model.init)(jax.random.key(0), images(0), np.zeros(shape[0], np.int32))
    state = ddpm.init_train_state(jax.random.key(1), variables, optimizer)
    step = ddpm.make_train_step(schedule, model.apply, optimizer, ema_decay=0.9)
    return jax.jit(step, donate_argnums=0), state, images, half, name


def _tree(state: Any) -> Any:
    """The state with its key as numbers."""
    import jax

    return state._replace(key=jax.random.key_data(state.key))


def _arrays(state: Any) -> dict[str, np.ndarray]:
    from jax_ddpm.io.arrays import flatten

    return {name: np.asarray(leaf) for name, leaf in flatten(_tree(state)).items()}


def _save(folder: Path, step: int, state: Any) -> None:
    if not available("safetensors"):
        return _write(folder / "checkpoint.npz", _arrays(state))
    from jax_ddpm.io.checkpoint import save_checkpoint

    save_checkpoint(folder / "checkpoints", step, {"state": _tree(state)}, {})


def _load(folder: Path, template: Any) -> Any:
    import jax

    from jax_ddpm.io.checkpoint import list_checkpoints, load_checkpoint, restore

    if available("safetensors"):
        [path] = list_checkpoints(folder / "checkpoints")
        flat = load_checkpoint(path).arrays["state"]
    else:
        flat = _read(folder / "checkpoint.npz")
    # Copies, since the state is donated.
    state = jax.tree.map(jax.numpy.array, restore(_tree(template), flat))
    return state._replace(key=jax.random.wrap_key_data(state.key))


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


_MEASUREMENTS: dict[str, Callable[..., dict[str, Any]]] = {
    "attention": _attention,
    "backend": _backend,
    "memory": _memory,
    "resume": _resume,
    "start": _start,
}

if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps(_MEASUREMENTS[what](*arguments)))
