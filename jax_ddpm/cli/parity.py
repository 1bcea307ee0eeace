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

    from jax_ddpm.parity import CASES, DType, Report, run_case

    word = (config.only or "").lower()
    work = [(x, dtype) for x in CASES if word in x.name.lower() for dtype in get_args(DType)]
    if not work:
        raise UsageError(f"--only: expected a word in the name of a comparison, got {config.only}")
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
