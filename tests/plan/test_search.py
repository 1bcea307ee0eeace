"""The search for the largest batch, on memories that are known."""

import numpy as np
import pytest

from jax_ddpm.plan.compilation import Plan
from jax_ddpm.plan.measuring import largest_training
from jax_ddpm.plan.targets import parse_target

TARGET = parse_target("v5e")
FIRST = Plan(TARGET, 4, "train", 0, 1, "float32")


def search(needed, first, unit, says_how_much=True):
    """On a device where a batch needs so much of the memory, 1 is all; and every batch tried."""
    calls = []

    def measure(batch):
        calls.append(batch)
        memory = int(needed(batch) * TARGET.memory)
        fits = memory <= TARGET.memory
        return FIRST._replace(
            images=batch, needed=memory if fits or says_how_much else None, fits=fits
        )

    return *largest_training(measure(first), unit, measure), calls


@pytest.mark.parametrize("unit", [1, 8])
@pytest.mark.parametrize("first", [8, 128, 4096])
@pytest.mark.parametrize("says_how_much", [True, False])
def test_the_largest_batch(unit, first, says_how_much):
    """Within a tenth, in five calls, with or without the memory of what does not fit."""
    needed = lambda batch: (500 + 7 * batch + 0.01 * batch**1.2) / 16_000
    plan, found, _, calls = search(needed, first, unit, says_how_much)
    fits, fails = plan.largest_batch
    assert len(calls) <= 5 and fits % unit == 0 and set(calls) <= set(range(0, 10**6, unit))
    assert needed(fits) <= 1 and (fails is None or needed(fails) > 1)
    assert 0.85 * 2190 < fits <= 2190 and (plan.images, found.images) == (first, fits)


def test_the_memory_of_a_tpu():
    """As measured on v5e, in MiB: less a straight line than that of a GPU."""
    batches = [0, 16, 1737, 2528, 2900, 3100, 3515]
    memory = [0, 145, 10_874, 13_120, 14_705, 18_964, 21_422]
    plan, *_ = search(lambda batch: np.interp(batch, batches, memory) / 16_128, 16, 1)
    assert 2800 < plan.largest_batch[0] < 2970


def test_what_the_search_says():
    """On a device of `limit` bytes where an image takes one."""
    for limit, words in (
        (1000, "980 images, in 98% of the memory; more were not tried"),
        (100, "96 images, in 96% of the memory; 128 images did not fit"),
        (2, "0 images, 8 images did not fit"),
    ):
        _, found, line, _ = search(lambda batch, limit=limit: batch / limit, 128, 4, limit > 100)
        assert line == f"  largest batch: {words}" and bool(found) == (limit > 2)
