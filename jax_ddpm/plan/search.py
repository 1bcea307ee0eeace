"""The largest batch that fits, in few compilations: memory is nearly a straight line in it."""

import math
from collections.abc import Callable

__all__ = ["largest_batch"]

Memory = dict[int, int | float]

_TRIALS = 5
_CLOSE = 1.1
_MARGIN = 0.98


def largest_batch(
    needed: Callable[[int], int | float], available: int | float, first: int, unit: int
) -> tuple[int, int | None]:
    """The largest multiple of `unit` found to fit, and the smallest found not to, if any.

    `needed(batch)` is the memory of a batch, infinite where all that is known is that it does not
    fit. The search starts at `first` and ends within 10 % of the limit, or after five calls.
    """
    fits: Memory = {0: 0}
    fails: Memory = {}
    batch = first
    for _ in range(_TRIALS):
        memory = needed(batch)
        (fits if memory <= available else fails)[batch] = memory
        low, high = max(fits), min(fails, default=math.inf)
        if high <= max(_CLOSE * low, low + unit) or _CLOSE * fits[low] >= available:
            break
        batch = _next(fits, fails, available, unit)
    return max(fits), min(fails, default=None)


def _next(fits: Memory, fails: Memory, available: int | float, unit: int) -> int:
    """A little below where the line through the two points nearest to the limit meets it."""
    low, high = max(fits), min(fails, default=None)
    points = [point for point in (fits | fails).items() if point[1] < math.inf]
    points = sorted(points, key=lambda point: abs(point[1] - available))[:2]
    if len(points) == 2 and points[0][1] != points[1][1]:
        (x0, y0), (x1, y1) = points
        guess = _MARGIN * (x0 + (available - y0) * (x1 - x0) / (y1 - y0))
    else:
        guess = 2 * low if high is None else (low + high) / 2
    batch = int(guess) // unit * unit
    return max(batch, low + unit) if high is None else min(max(batch, low + unit), high - unit)
