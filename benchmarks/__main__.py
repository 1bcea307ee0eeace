"""`python -m benchmarks`: measure, and print the tables; `--record` keeps them."""

import argparse
import json
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness import FULL, SHORT, measure

SECTIONS = {
    "overhead": "sampling",
    "peak": "sampling",
    "sampling": "sampling",
    "training": "training",
    "cifar10_sampling": "sampling",
    "cifar10_training": "training",
    "checkpoints": "training",
    "growth": "sampling",
    "scaling": "scaling",
    "processes": "processes",
}
"""In the order in which they run, each with its file: a section is a function of its name."""


def main() -> None:
    """Parse the command line, measure, report."""
    if sys.argv[1:2] == ["accelerator"]:
        from benchmarks import accelerator

        accelerator.main(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)}: these alone; what is recorded of the others stays",
    )
    parser.add_argument("--full", action="store_true", help="batch 64 too, and more rounds")
    parser.add_argument("--check", action="store_true", help="say what moved since the record")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write the record: all of it, or the named sections of one made in the same way",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(__file__).parent / "results",
        help="where the record is (default: benchmarks/results)",
    )
    arguments = parser.parse_args()
    for name in arguments.sections:
        if name not in SECTIONS:
            parser.error(f"expected sections of {', '.join(SECTIONS)}, got {name}")
    for package in ("torch", "diffusers", "matplotlib"):
        if find_spec(package) is None:
            _stop(f'{package} is missing: pip install -e ".[test]"')
    recorded = arguments.out / "benchmarks.json"
    if not recorded.exists() and (arguments.check or arguments.record and arguments.sections):
        _stop(f"expected a record to compare with or to add to, got none at {recorded}")
    record = json.loads(recorded.read_text()) if recorded.exists() else {}
    settings = FULL if arguments.full else SHORT
    new: dict[str, Any] = {"settings": json.loads(json.dumps(asdict(settings)))}
    # A process for each section: none inherits another's memory or threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as processes:
        for name in arguments.sections or SECTIONS:
            section = processes.submit(measure, SECTIONS[name], name, settings)
            if error := section.exception():
                print(f"benchmarks: {name}: {error}", file=sys.stderr)
                sys.exit(1)
            new["machine"], new[name] = section.result()
            if arguments.record and arguments.sections and not _alike(record, new):
                _stop(f"{recorded} is of another machine, other versions or other settings")
    from benchmarks import report

    print(report.markdown(new))
    if arguments.record:
        results = record | new if arguments.sections else new
        arguments.out.mkdir(parents=True, exist_ok=True)
        recorded.write_text(json.dumps(results, indent=1) + "\n")
        (arguments.out / "benchmarks.md").write_text(report.markdown(results))
        report.plot(results, arguments.out / "benchmarks.png")
        report.plot_scaling(results["scaling"], arguments.out / "scaling.png")
        print(f"wrote benchmarks.json, .md, .png and scaling.png to {arguments.out}")
    if arguments.check:
        lines = report.moved(record, new)
        print("\n".join(lines) or "no ratio moved by more than the noise")
        sys.exit(1 if lines else 0)


def _alike(record: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether both were measured in the same way on the same machine, whenever it was."""
    machines = [each["machine"] | {"date": None} for each in (record, new)]
    return machines[0] == machines[1] and record["settings"] == new["settings"]


def _stop(problem: str) -> NoReturn:
    print(f"benchmarks: {problem}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
