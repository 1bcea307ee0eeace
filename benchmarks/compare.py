"""Before anything is timed: do the contenders compute the same thing?"""

from collections.abc import Mapping

import numpy as np

__all__ = ["Disagreement", "check_agreement", "max_relative_difference"]


class Disagreement(Exception):
    """Two contenders computed different things, so their times cannot be compared."""


def max_relative_difference(value: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference over the largest reference value; infinite where anything is not finite.

    Raises `ValueError` if the shapes differ.
    """
    value, reference = np.asarray(value, np.float64), np.asarray(reference, np.float64)
    if value.shape != reference.shape:
        raise ValueError(f"value: expected shape {reference.shape}, got {value.shape}")
    if not (np.isfinite(value).all() and np.isfinite(reference).all()):
        return float("inf")
    return float(np.max(np.abs(value - reference)) / np.max(np.abs(reference)))


def check_agreement(
    outputs: Mapping[str, np.ndarray], reference: str, tolerance: float
) -> dict[str, float]:
    """Each contender's `max_relative_difference` from the one named `reference`.

    Raises `Disagreement`, naming the contenders, if any is above `tolerance`.
    """
    differences = {
        name: max_relative_difference(output, outputs[reference])
        for name, output in outputs.items()
        if name != reference
    }
    wrong = [f"{name} by {diff:.1e}" for name, diff in differences.items() if not diff <= tolerance]
    if wrong:
        raise Disagreement(
            f"expected outputs within {tolerance:.0e} of {reference}'s, got {', '.join(wrong)}"
        )
    return differences
