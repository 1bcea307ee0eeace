"""`jax-ddpm parity`: every certified comparison with PyTorch, as a table."""

import platform
import sys
from typing import get_args

import jax
from tqdm import tqdm

from jax_ddpm.cli.config import ParityConfig, UsageError, check_file, writing
from jax_ddpm.io.json import write_json

__all__ = ["parity"]

_TITLES = {
    "maths": "schedule, q, p, losses",
    "likelihood": "variational bound",
    "weights": "converted weights",
    "forward": "network",
    "gradients": "network, gradients",
    "training": "training",
    "chain": "reverse chain",
    "unet": "U-Net against diffusers'",
    "unet gradients": "U-Net, gradients",
    "unet chain": "U-Net, reverse chain",
}


def parity(config: ParityConfig) -> None:
    """Run all cases in float64 and float32, print the table; exit code 1 if one fails."""
    check_file("--json", config.json)
    jax.config.update("jax_enable_x64", True)
    import torch

    from jax_ddpm.parity import CASES, DType, run_case

    word = (config.only or "").lower()
    cases = [case for case in CASES if word in case.name.lower()]
    if not cases:
        raise UsageError(f"--only: expected a word in the name of a comparison, got {config.only}")
    work = [(case, dtype) for case in cases for dtype in get_args(DType)]
    results = [
        run_case(case, dtype)
        for case, dtype in tqdm(work, desc="comparing", unit="case", leave=False)
    ]
    print(
        f"jax {jax.__version__} on {jax.devices()[0].device_kind} · torch {torch.__version__} "
        f"on cpu · python {platform.python_version()}"
    )
    print("worst error over the largest reference value, and its limit\n")
    width = max(len(case.name) for case in cases) + 2
    print(f"  {'':<{width}}{'float64':^22}  {'float32':^22}")
    kind = None
    for double, single in zip(results[::2], results[1::2], strict=True):
        if double.kind != kind:
            kind = double.kind
            print(f"{_TITLES[kind]}")
        print(f"  {double.name:<{width}}{_cell(double)}  {_cell(single)}")
    failed = [result for result in results if not result.passed]
    seconds = sum(result.seconds for result in results)
    print(f"\n{len(results) - len(failed)} of {len(results)} comparisons hold ({seconds:.0f} s)")
    if config.json is not None:
        rows = [{**result._asdict(), "passed": result.passed} for result in results]
        with writing("--json", config.json):
            write_json(config.json, rows)
    if failed:
        for result in failed:
            print(f"FAILED: {result.name}, {result.dtype}", file=sys.stderr)
        sys.exit(1)


def _cell(result) -> str:
    mark = "✓" if result.passed else "✗"
    error = "equal" if result.error == 0 else f"{result.error:.1e}"
    limit = "= to the bit" if result.tolerance == 0 else f"≤ {result.tolerance:.0e}"
    return f"{mark} {error:>7} {limit:<12}"
