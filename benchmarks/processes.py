"""What only a new process shows: peak memory, and the time until the first picture."""

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from benchmarks.contenders import JAX_SHARDED, torch_contenders
from benchmarks.settings import Settings
from jax_ddpm.interop import Pretrained
from jax_ddpm.models import ddpm_digits
from jax_ddpm.runs.run import Run, init_variables, save_run
from jax_ddpm.runs.settings import named_schedule

__all__ = ["median", "run"]

_BATCH, _STEPS = 16, 4


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Medians of processes; Linux only."""
    rows = []
    sides = {JAX_SHARDED: "jax"} | {name: name for name in torch_contenders()}
    for name, side in sides.items():
        log(f"peak memory: {name} …")
        peaks = [
            _fresh("memory", side, str(_BATCH), str(_STEPS))["bytes"]
            for _ in range(settings.processes)
        ]
        rows.append({"what": "memory", "contender": name, "batch": _BATCH, "bytes": peaks})
    for side, name in {"jax": "JAX jit", "torch": "torch's scaled_dot_product_attention"}.items():
        for part in ("forward", "gradient"):
            log(f"memory of attention: {name}, {part} …")
            row = {"what": "attention", "side": side, "contender": name, "pass": part}
            peaks = [_fresh("attention", side, part)["bytes"] for _ in range(settings.processes)]
            rows.append({**row, "bytes": peaks})
    with tempfile.TemporaryDirectory() as folder:
        _write_run(Path(folder) / "run")
        log("time to the first picture …")
        for number in range(settings.processes):
            cache = Path(folder) / f"cache{number}"
            cache.mkdir()
            for name in ("cold", "cache warm"):
                seconds = _fresh("start", f"{folder}/run", str(cache))
                rows.append({"what": "start", "contender": name, **seconds})
    return rows


def median(rows: list[dict[str, Any]], what: str, contender: str, field: str) -> float:
    """Of one field of the rows of one contender."""
    chosen = [row for row in rows if (row["what"], row["contender"]) == (what, contender)]
    values = [row[field] for row in chosen]
    return statistics.median(values[0] if isinstance(values[0], list) else values)


def _fresh(*arguments: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.fresh", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}: {result.stderr.strip().splitlines()[-1]}")
    return json.loads(result.stdout.splitlines()[-1])


def _write_run(folder: Path) -> None:
    model, shape = ddpm_digits(), (8, 8, 1)
    variables = jax.device_get(init_variables(model, jax.random.key(0), shape))
    pretrained = Pretrained(model, variables, named_schedule("cosine", 200))
    save_run(folder, Run(pretrained, shape, 10, 10, guidance=2.0))
