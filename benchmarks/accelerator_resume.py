"""Training that was stopped and resumed, against training that was not: equal to the bit?

One process takes k steps, saves, and takes k more. A new process restores what was saved and
takes the last k steps again. Each compiles for itself. On a GPU both run under
`--xla_gpu_deterministic_ops=true`: otherwise sums are added up in whatever order threads come.
"""

import io
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.accelerator_rows import Row, available

__all__ = ["DETERMINISTIC", "check", "differing"]

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"
_ROOT = Path(__file__).parents[1]
_TIMEOUT = 150.0
_CHECKPOINT, _NPZ = "jax_ddpm.io.checkpoint", ".npz, since safetensors is missing"


def check(*, tiny: bool) -> list[Row]:
    """Run both processes and compare every array. Call before this process starts JAX's backend:
    a TPU serves one process at a time."""
    backend = _child("backend", Path(), tiny, flags="")["backend"]
    flags = DETERMINISTIC if backend == "gpu" else ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        whole = _child("whole", folder, tiny, flags)
        _child("resumed", folder, tiny, flags)
        ours, theirs = (_read(folder / f"{kind}.npz") for kind in ("resumed", "whole"))
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


def _child(what: str, folder: Path, tiny: bool, flags: str) -> dict[str, Any]:
    """Run this file in a new process; what it says of itself."""
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if flags:
        environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    command = [sys.executable, "-m", "benchmarks.accelerator_resume", what, str(folder)]
    result = subprocess.run(
        [*command, "--tiny"] if tiny else command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    if result.returncode:
        last = (result.stderr.strip() or "nothing said").splitlines()[-1]
        raise RuntimeError(f"process {what!r}: exit code {result.returncode}: {last}")
    return json.loads(result.stdout.splitlines()[-1])


def _main(what: str, folder: Path, tiny: bool) -> None:
    """One process; its last line is JSON."""
    import jax

    # A program that was kept would be the other process's.
    jax.config.update("jax_enable_compilation_cache", False)
    if what == "backend":
        print(json.dumps({"backend": jax.default_backend()}))
        return
    step, state, images, half, network = _training(tiny)
    first = 0
    if what == "resumed":
        state, first = _load(folder, state), half
    for number in range(first, 2 * half):
        if what == "whole" and number == half:
            _save(folder, half, state)
        state, _ = step(state, images(number))
    _write(folder / f"{what}.npz", _arrays(state))
    said = {
        "network": network,
        "steps": 2 * half,
        "saved_with": _CHECKPOINT if available("safetensors") else _NPZ,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }
    print(json.dumps(said))


def _training(tiny: bool) -> tuple[Any, Any, Any, int, str]:
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
    from jax_ddpm.io.files import replace_file

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # pyright: ignore[reportArgumentType]
    replace_file(path, buffer.getvalue())


def _read(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as arrays:
        return dict(arrays)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), "--tiny" in sys.argv)
