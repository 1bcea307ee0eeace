"""Every file of a run, against what it says of itself."""

from pathlib import Path
from typing import Any, NamedTuple

from jax_ddpm._errors import FieldError
from jax_ddpm.io.checkpoint import LEFTOVERS, Damaged, list_checkpoints, load_checkpoint
from jax_ddpm.io.files import read_json
from jax_ddpm.runs.metrics import LOG_EVERY, damaged_lines, read_metrics
from jax_ddpm.runs.model import CHECKPOINTS, CONFIG, FILES, METRICS, PathLike


class Findings(NamedTuple):
    """What is in a run's folder."""

    intact: list[int]
    """Steps of checkpoints that are to the bit what was written."""
    damaged: list[int]
    """Steps of those that are not."""
    notes: list[str]
    """What is no damage."""
    problems: list[str]
    """What is wrong, a line for each file."""


def check_run(folder: PathLike) -> Findings:
    """Read all of a run. Raises `FieldError` if `folder` is not a run's."""
    folder = Path(folder)
    if not (folder / CHECKPOINTS).is_dir():
        raise FieldError("folder", f"expected a run's folder, got {folder}")
    found, description = Findings([], [], [], []), None
    paths = list_checkpoints(folder / CHECKPOINTS)
    for path in paths:
        try:
            description = load_checkpoint(path).state.get("run")
            found.intact.append(int(path.name))
        except ValueError as error:
            found.problems.append(str(error))
            if isinstance(error, Damaged):
                found.damaged.append(int(path.name))
    _check_config(folder / CONFIG, description or {}, found)
    _check_metrics(folder / METRICS, int(paths[-1].name) if paths else 0, found)
    for path in sorted((folder / CHECKPOINTS).glob(".*")):
        leftover = path.suffix in LEFTOVERS
        what = "a leftover, which the next save removes" if leftover else "set aside"
        found.notes.append(f"{path.name}: {what}")
    return found


def is_whole(folder: Path) -> bool:
    """Whether a run has all of its files, and no damaged line of metrics."""
    return all((folder / name).exists() for name in FILES) and not damaged_lines(folder / METRICS)


def _check_config(path: Path, known: dict[str, Any], found: Findings) -> None:
    """It may say already what the next checkpoint will: a difference is no damage."""
    mended = "; the same training command mends it" if known.get("train") is not None else ""
    try:
        content = read_json(path)
    except ValueError as error:
        found.problems.append(f"{error}{mended}")
        return
    names = known.keys() - {"train", "versions"}
    if differing := sorted(name for name in names if content.get(name) != known[name]):
        found.notes.append(f"{path.name}: {', '.join(differing)} not as in the newest checkpoint")


def _check_metrics(path: Path, step: int, found: Findings) -> None:
    """Of a run whose newest checkpoint is of `step`."""
    steps = [line["step"] for line in read_metrics(path) if line["step"] <= step]
    if count := damaged_lines(path):
        remedy = "the same training command drops them"
        found.problems.append(f"{path}: {count} line(s) damaged; {remedy}")
    elif step >= LOG_EVERY and step - max(steps, default=0) >= LOG_EVERY:
        last = max(steps, default="none")
        found.problems.append(f"{path}: expected lines up to step {step:,}, got {last}")
