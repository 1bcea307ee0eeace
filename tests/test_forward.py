"""The forward process as users call it; `tests/parity` compares its values with torch."""

from functools import partial

import jax
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])
PREDICT = [value for name, value in vars(ddpm).items() if name.startswith("predict_")]
X_START, NOISE = np.random.default_rng(0).standard_normal((2, 4, 5, 6, 3))


@pytest.mark.parametrize("function", [ddpm.q_sample, *PREDICT])
def test_jit_vmap_and_batch(function):
    function, arguments = partial(function, SCHEDULE), (X_START, T, NOISE)
    whole, alone = function(*arguments), function(*(each[2:3] for each in arguments))
    assert whole.shape == X_START.shape
    np.testing.assert_array_equal(alone, whole[2:3])
    each = jax.jit(jax.vmap(function))(*arguments)
    np.testing.assert_allclose(each, whole, rtol=1e-12, atol=1e-12)
