"""What the accelerator's record is made of: rows, each with a status.

passed, timed     as it should be
failed            wrong, or stopped by an error; the exit code is 1
out of memory     of one batch size: no failure
left out          by name, with the reason: a package, a device or the time is missing
"""

import gc
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

__all__ = ["Row", "attempt", "available", "left_out", "problem", "release"]

Row = dict[str, Any]

_OUT_OF_MEMORY = ("RESOURCE_EXHAUSTED", "out of memory")


def attempt(labels: Row, work: Callable[[], list[Row]]) -> list[Row]:
    """The rows that `work` returns; where it raises, one that says so."""
    try:
        return work()
    except Exception as error:
        return [problem(labels, error)]


def problem(labels: Row, error: Exception) -> Row:
    """A row for what raised `error`."""
    text = str(error).strip()
    memory = isinstance(error, MemoryError) or any(each in text for each in _OUT_OF_MEMORY)
    line = text.partition("\n")[0][:300]
    return {
        **labels,
        "status": "out of memory" if memory else "failed",
        "problem": f"{type(error).__name__}: {line}",
    }


def left_out(labels: Row, reason: str) -> Row:
    """A row for what was not done."""
    return {**labels, "status": "left out", "problem": reason}


def available(package: str) -> bool:
    """Whether `package` can be imported here."""
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):
        return False


def release() -> None:
    """Give back what nobody holds any more, so that the other side has the memory."""
    # Here and not above, so that the processes that only resume start sooner.
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
