"""Measure, compare with the record, and print the tables: `python -m benchmarks`.

These run only by name: inception, loading, profile. These have options and records of their own
(`python -m benchmarks accelerator --help`): accelerator (one GPU or TPU), plan (the table of
`jax-ddpm plan`), samplers (every sampler at few steps).
"""

import json
import sys
from importlib import import_module
from typing import Any, NoReturn

from benchmarks.harness import in_new_process, measure, options, write

RACES = ("overhead", "peak", "sampling", "training", "cifar10_sampling", "cifar10_training")
SECTIONS = (*RACES, "checkpoints", "growth", "scaling", "processes")
BY_NAME = ("inception", "loading", "profile")
SCRIPTS = ("accelerator", "plan", "samplers")


def main() -> None:
    """Parse the command line, measure, report."""
    sys.argv[0] = "python -m benchmarks"
    if len(sys.argv) > 1 and sys.argv[1] in SCRIPTS:
        script = import_module(f"benchmarks.{sys.argv[1]}")
        sys.argv[:2] = [" ".join(sys.argv[:2])]
        return script.main()
    parser = options(__doc__)
    sections = f"of {', '.join(SECTIONS)} (default: all of these)"
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=sections)
    parser.add_argument("--full", action="store_true", help="larger batches too, and more rounds")
    parser.add_argument("--check", action="store_true", help="say what moved since the record")
    parser.add_argument("--record", action="store_true", help="write the record, or these sections")
    arguments = parser.parse_args()
    sections = arguments.sections or SECTIONS
    if unknown := set(sections) - {*SECTIONS, *BY_NAME}:
        parser.error(f"expected of {', '.join([*SECTIONS, *BY_NAME])}, got {', '.join(unknown)}")
    path = arguments.out / "benchmarks.json"
    if not path.exists() and (arguments.check or arguments.record and arguments.sections):
        _stop(f"expected a record to compare with or to add to, got none at {path}")
    record = json.loads(path.read_text()) if path.exists() else {}
    new: dict[str, Any] = {"full": arguments.full}
    for name in sections:
        try:
            machine, rows = in_new_process(measure, name, arguments.full)
        except Exception as error:
            _stop(f"{name}: {error}", code=1)
        new |= {"machine": machine, name: rows}
        if arguments.record and arguments.sections and not _alike(record, new):
            _stop(f"{path} is of another machine, other versions or other settings")
    from benchmarks import report

    print(report.markdown(new))
    if arguments.record:
        results = record | new if arguments.sections else new
        write(path, results, report.markdown(results))
        report.plot_scaling(results["scaling"], arguments.out / "scaling.png")
        print(f"wrote benchmarks.json, .md and scaling.png to {arguments.out}")
    if arguments.check:
        lines = report.moved(record, new)
        print("\n".join(lines) or "no ratio moved by more than the noise")
        sys.exit(1 if lines else 0)


def _alike(record: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether both were measured in the same way on the same machine, whenever it was."""
    facts = [(each["full"], each["machine"] | {"date": None}) for each in (record, new)]
    return facts[0] == facts[1]


def _stop(problem: str, code: int = 2) -> NoReturn:
    print(f"benchmarks: {problem}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()
