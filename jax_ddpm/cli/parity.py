"""`jax-ddpm parity`: every certified comparison with PyTorch, as a table."""

import platform
import sys
from typing import get_args

import jax
from tqdm import tqdm

from jax_ddpm.cli.config import ParityConfig
from jax_ddpm.cli.errors import UsageError, check_file, writing
from jax_ddpm.io.files import write_json


def parity(config: ParityConfig) -> None:
    """Run all cases in float64 and float32, print the table; exit code 1 if one fails."""
    check_file("--json", config.json)
    jax.config.update("jax_enable_x64", True)
    import torch

    from jax_ddpm.parity import CASES, DType, run_case
    from jax_ddpm.parity.table import report

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
    print(report(results))
    if config.json is not None:
        rows = [{**result._asdict(), "passed": result.passed} for result in results]
        with writing("--json", config.json):
            write_json(config.json, rows)
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"FAILED: {result.name}, {result.dtype}", file=sys.stderr)
    if failed:
        sys.exit(1)
