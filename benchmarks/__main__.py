"""`python -m benchmarks`: run everything, print the tables, write JSON, markdown and a picture."""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.section import measure
from benchmarks.settings import FULL, SHORT

SECTIONS = (
    "overhead",
    "peak",
    "sampling",
    "training",
    "cifar10_sampling",
    "cifar10_training",
    "checkpoints",
    "growth",
    "scaling",
    "processes",
)


def main() -> None:
    """Parse the command line, measure, report."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--full", action="store_true", help="batch 64 too, and more rounds")
    parser.add_argument(
        "--check", action="store_true", help="write nothing, say what moved since the record"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    for package in ("torch", "diffusers", "matplotlib"):
        if find_spec(package) is None:
            print(
                f'benchmarks: {package} is missing: pip install "jax_ddpm[test]"', file=sys.stderr
            )
            sys.exit(2)
    recorded = arguments.out / "benchmarks.json"
    if arguments.check and not recorded.exists():
        print(f"benchmarks: --check: expected a record, got none at {recorded}", file=sys.stderr)
        sys.exit(2)
    settings = FULL if arguments.full else SHORT
    results: dict[str, Any] = {"settings": asdict(settings)}
    # A process for each section: training's needs a larger pool of threads than sampling's.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        for name in SECTIONS:
            section = processes.submit(measure, name, settings)
            if error := section.exception():
                print(f"benchmarks: {name}: {error}", file=sys.stderr)
                sys.exit(1)
            results["machine"], results[name] = section.result()
    from benchmarks import report
    from benchmarks.ratios import moved

    if arguments.check:
        lines = moved(json.loads(recorded.read_text()), results)
        print("\n".join(lines) or "no ratio moved by more than the noise")
        sys.exit(1 if lines else 0)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "benchmarks.json").write_text(json.dumps(results, indent=1) + "\n")
    (arguments.out / "benchmarks.md").write_text(report.markdown(results))
    report.plot(results, arguments.out / "benchmarks.png")
    report.plot_scaling(results["scaling"], arguments.out / "scaling.png")
    print(report.markdown(results))
    print(f"wrote benchmarks.json, .md, .png and scaling.png to {arguments.out}")


if __name__ == "__main__":
    main()
