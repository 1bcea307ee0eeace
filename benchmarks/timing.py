"""Contenders take turns, so that a slow minute of the machine slows them all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

__all__ = ["interleave", "summary", "timed"]


Result = TypeVar("Result")


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """`function()` and the seconds it took."""
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run in each round, in the order A, B, C, A, B, C, …

    A run returns only when its work is done. One untimed round comes first.
    """
    times = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            _, seconds = timed(run)
            if number > 0:
                times[name].append(seconds)
    return times


def summary(times: list[float]) -> tuple[float, float, float]:
    """Median, lowest and highest."""
    return statistics.median(times), min(times), max(times)
