"""The largest batch that fits, in few compilations: memory is nearly a straight line in it."""

import math
from collections.abc import Callable

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
    """A little below where the line through the two points about the limit meets it."""
    low, high = max(fits), min(fails, default=None)
    memory = fits | fails
    x0, x1 = sorted(fits)[-2:] if high is None else (low, high)
    rise = memory[x1] - memory[x0]
    if 0 < rise < math.inf:
        guess = _MARGIN * (x0 + (available - memory[x0]) * (x1 - x0) / rise)
    else:
        guess = 2 * low if high is None else (low + high) / 2
    batch = int(guess) // unit * unit
    return max(batch, low + unit) if high is None else min(max(batch, low + unit), high - unit)
