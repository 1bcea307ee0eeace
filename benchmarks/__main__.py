"""`python -m benchmarks`: run everything, print the tables, write JSON, markdown and a picture."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from jax_ddpm.training.sharding import use_cpu_cores


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="batch 64 too, and more rounds")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    use_cpu_cores()
    try:
        from benchmarks import growth, machine, overhead, report, sampling, training
        from benchmarks.compare import Disagreement
    except ModuleNotFoundError as error:
        print(f'benchmarks: {error.name} is missing: pip install "jax_ddpm[test]"', file=sys.stderr)
        sys.exit(2)
    import jax
    import torch

    from benchmarks.settings import FULL, SHORT

    jax.config.update("jax_default_matmul_precision", "highest")
    torch.set_num_threads(machine.cores())
    settings = FULL if arguments.full else SHORT
    log = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    try:
        results = {
            "machine": machine.describe(),
            "settings": asdict(settings),
            "overhead": overhead.run(settings, log),
            "growth": growth.run(settings, log),
            "sampling": sampling.run(settings, log),
            "training": training.run(settings, log),
        }
    except Disagreement as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        sys.exit(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "benchmarks.md").write_text(report.markdown(results))
    report.plot(results, arguments.out / "benchmarks.png")
    print(report.markdown(results))
    print(f"wrote benchmarks.json, benchmarks.md and benchmarks.png to {arguments.out}")


if __name__ == "__main__":
    main()
