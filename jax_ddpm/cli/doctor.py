"""`jax-ddpm parity` and `doctor`: the proof, on this machine, and the files of a run."""

import platform
import re
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jax_ddpm._errors import suggestion
from jax_ddpm._table import counted, table
from jax_ddpm.cli.config import DoctorConfig, ParityConfig
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.cpu import use_cores
from jax_ddpm.io.files import write_json
from jax_ddpm.runs import check_run
from jax_ddpm.runs.drawing import check_export
from jax_ddpm.runs.resume import Findings

_PACKAGES = ("jax_ddpm", "jax", "jaxlib", "flax", "optax", "numpy", "safetensors", "torch")
_SECONDS = 20.0


def parity(config: ParityConfig) -> None:
    """Run all cases in float64 and float32, print the table; exit code 1 if one fails."""
    check_file("--json", config.json)
    jax.config.update("jax_enable_x64", True)
    import torch

    from jax_ddpm.parity import CASES, Report, run_case
    from jax_ddpm.parity.harness import DType

    word = (config.only or "").lower()
    work = [(x, dtype) for x in CASES if word in x.name.lower() for dtype in get_args(DType)]
    if not work:
        words = {each for case in CASES for each in re.findall(r"[a-z]+", case.name.lower())}
        problem = "expected a word in the name of a comparison"
        raise UsageError(f"--only: {problem}, got {word}{suggestion(word, words)}")
    results = tuple(run_case(*each) for each in tqdm(work, "comparing", unit="case", leave=False))
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind} · torch {torch.__version__} "
        f"on cpu · python {platform.python_version()}"
    )
    print("error: the largest difference over the largest reference value, of the worst array\n")
    print(Report(results))
    passed, seconds = sum(x.passed for x in results), sum(x.seconds for x in results)
    print(f"\n{passed} of {len(results)} comparisons hold ({seconds:.0f} s)")
    if config.json is not None:
        rows = [{**result._asdict(), "passed": result.passed} for result in results]
        with writing("--json", config.json):
            write_json(config.json, rows)
    if passed < len(results):
        sys.exit(1)


def doctor(config: DoctorConfig) -> None:
    """Print what was found; exit code 1 if something is wrong."""
    with naming(folder="--run"):
        found = None if config.run is None else check_run(config.run)
    if config.export is not None and not config.export.is_file():
        raise UsageError(f"--export: no such file: {config.export}")
    # Before JAX's first use: parity's precision, and the devices that `train` would use.
    jax.config.update("jax_enable_x64", True)
    use_cores()
    kinds = [device.device_kind for device in jax.devices()]
    present = ", ".join(f"{kinds.count(kind)} × {kind}" for kind in dict.fromkeys(kinds))
    rows = [
        ("versions", f"python {platform.python_version()}, {', '.join(map(_version, _PACKAGES))}"),
        ("devices", f"{present} ({jax.default_backend()})"),
        ("precision", _precision()),
    ]
    print(table("<<", rows))
    problems = _parity()
    if found is not None and config.run is not None:
        problems += _run(config.run, found)
    if config.export is not None:
        problems += _export(config.export)
    print(f"\n{counted(problems, 'problem') if problems else 'no problem'} found")
    sys.exit(1 if problems else 0)


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"


def _precision() -> str:
    """The error of a float32 matrix product, by default and at the highest precision."""
    a, b = np.random.default_rng(0).standard_normal((2, 256, 256))
    exact = a @ b

    def error(precision):
        product = jnp.matmul(a.astype(np.float32), b.astype(np.float32), precision=precision)
        return float(np.max(np.abs(np.asarray(product, np.float64) - exact)) / np.abs(exact).max())

    default, highest = error(None), error("highest")
    line = f"float32 matrix products have an error of {default:.0e}"
    return line if default <= 10 * highest else f'{line}; {highest:.0e} with precision="highest"'


def _parity() -> int:
    """As many comparisons with PyTorch as 20 seconds hold; returns how many fail."""
    if find_spec("torch") is None or find_spec("diffusers") is None:
        print('parity     not compared: pip install "jax_ddpm[parity]"')
        return 0
    from jax_ddpm.parity import CASES, run_case

    start, results = time.perf_counter(), []
    for case in CASES:
        for dtype in ("float64", "float32"):
            if time.perf_counter() - start < _SECONDS:
                results.append(run_case(case, dtype))
    failed = [result for result in results if not result.passed]
    print(
        f"parity     {len(results) - len(failed)} of {len(results)} comparisons with PyTorch hold, "
        f"in {time.perf_counter() - start:.0f} s (`jax-ddpm parity` runs all {2 * len(CASES)})"
    )
    for result in failed:
        print(f"           FAILED: {result.name}, {result.dtype}: {result.error:.1e}")
    return len(failed)


def _run(folder: Path, found: Findings) -> int:
    """Every file of a run; returns how many are not intact."""
    print(f"run        {folder}")
    intact = [f"step {step:,} intact" for step in found.intact]
    for line in (*intact, *(f"WRONG: {problem}" for problem in found.problems)):
        print(f"           {line}")
    if found.damaged and not found.intact:
        print("           no checkpoint is intact: train or convert anew")
    elif found.damaged and found.damaged[-1] < found.intact[-1]:
        print("           the newest checkpoint is intact: remove the damaged ones")
    elif found.damaged:
        print(
            "           the same training command sets the damaged checkpoints aside and resumes "
            f"from step {found.intact[-1]:,}; until then, give --checkpoint {found.intact[-1]}"
        )
    return len(found.problems)


def _export(path: Path) -> int:
    """An exported file against its manifest; returns 1 if it is not intact."""
    try:
        check_export(path)
    except (OSError, ValueError) as error:
        print(f"export     {path}: WRONG: {error}")
        return 1
    print(f"export     {path}: intact")
    return 0
