"""The search for the largest batch, on memories that are known."""

import math

import numpy as np
import pytest

from jax_ddpm.plan.measuring import largest_batch


@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("first", [8, 128, 4096])
@pytest.mark.parametrize("says_how_much", [True, False])
def test_the_largest_batch(unit, first, says_how_much):
    """Within a tenth, in five calls, with or without the memory of what does not fit."""
    calls = []

    def needed(batch):
        calls.append(batch)
        memory = 500 + 7 * batch + 0.01 * batch**1.2
        return memory if memory <= 16_000 or says_how_much else math.inf

    fits, fails = largest_batch(needed, 16_000, first, unit)
    assert len(calls) <= 5 and fits % unit == 0 and set(calls) <= set(range(0, 10**6, unit))
    assert needed(fits) <= 16_000 and (fails is None or needed(fails) > 16_000)
    assert 0.85 * 2190 < fits <= 2190


def test_the_memory_of_a_tpu():
    """As measured on v5e, in MiB: less a straight line than that of a GPU."""
    batches = [0, 16, 1737, 2528, 2900, 3100, 3515]
    memory = [0, 145, 10_874, 13_120, 14_705, 18_964, 21_422]
    fits, _ = largest_batch(lambda batch: np.interp(batch, batches, memory), 16_128, 16, 1)
    assert 2800 < fits < 2970
