"""Guidance where no label stands for none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_ddpm.models import ddpm_digits
from jax_ddpm.runs.programs import guided_denoise_fn

pytestmark = pytest.mark.usefixtures("defaults")


def test_a_model_whose_every_label_is_a_class_is_drawn_without_guidance(tmp_path, write_run):
    run = write_run(tmp_path / "run", ddpm_digits(9, block_out_channels=(8, 8)), num_classes=10)
    run = run._replace(null_label=None, guidance=1.0)
    x, t, labels = jnp.ones((2, 8, 8, 1)), jnp.zeros(2, int), jnp.array([9, 3])
    variables = run.pretrained.variables
    output = jax.jit(guided_denoise_fn(run, variables, labels))(x, t)
    apply = run.pretrained.model.apply
    expected = jax.jit(lambda x, t: apply(variables, x, t, labels))(x, t)
    np.testing.assert_array_equal(output, expected)
