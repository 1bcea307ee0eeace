import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm


@pytest.mark.parametrize(
    ("quantile", "max_value"), [(0.995, 1.0), (0.9, 1.5), (0.6, 3.0), (1.0, 100.0), (0.9, 0.5)]
)
def test_dynamic_is_that_of_diffusers(torch, diffusers, key, quantile, max_value):
    """Also for a `max_value` below 1, where the order of the two clamps decides."""
    x = 2 * jax.random.normal(key, (4, 5, 6, 3))
    x = x * jnp.array([0.1, 1.0, 2.0, 5.0]).reshape(4, 1, 1, 1)
    reference = diffusers.DDPMScheduler(
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=max_value
    )
    expected = reference._threshold_sample(torch.from_numpy(np.array(x).transpose(0, 3, 1, 2)))
    ours = jax.jit(ddpm.dynamic_threshold(quantile, max_value))(x)
    np.testing.assert_allclose(
        np.transpose(ours, (0, 3, 1, 2)), expected.numpy(), rtol=1e-6, atol=1e-6
    )


def test_static_clips(key):
    x = 3 * jax.random.normal(key, (4, 5))
    np.testing.assert_array_equal(ddpm.static_threshold(2.0)(x), np.clip(x, -2, 2))


def test_dtypes_are_kept(key):
    for dtype in (jnp.bfloat16, jnp.float32, jnp.float64):
        x = 3 * jax.random.normal(key, (2, 1000), dtype)
        assert ddpm.static_threshold(2.0)(x).dtype == dtype
        thresholded = ddpm.dynamic_threshold(0.995, 10.0)(x)
        assert thresholded.dtype == dtype
        assert 0.002 < np.mean(np.abs(thresholded.astype(float)) == 1) < 0.012


def test_equal_and_readable():
    """So that the scheduler config of a checkpoint can be written back from them."""
    assert ddpm.static_threshold(2.0) == ddpm.static_threshold(2.0) != ddpm.static_threshold(3.0)
    assert ddpm.dynamic_threshold() == ddpm.dynamic_threshold(0.995, 1.0)
    assert ddpm.dynamic_threshold() != ddpm.dynamic_threshold(0.9)
    assert len({ddpm.static_threshold(1.0), ddpm.static_threshold(1.0)}) == 1
    threshold = ddpm.dynamic_threshold(0.9, 1.5)
    assert (threshold.quantile, threshold.max_value) == (0.9, 1.5)
    assert ddpm.static_threshold(2.0).limit == 2.0


def test_in_p_mean_variance(key):
    """A limit of 1 is the default clipping, and so is the dynamic rule at its default."""
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
    x_t = 2 * jax.random.normal(key, (3, 4, 4, 2))
    default = ddpm.p_mean_variance(schedule, lambda x, t: -x, x_t, 150)
    for threshold in (ddpm.static_threshold(1.0), ddpm.dynamic_threshold()):
        p = ddpm.p_mean_variance(schedule, lambda x, t: -x, x_t, 150, clip_denoised=threshold)
        np.testing.assert_array_equal(p.pred_xstart, default.pred_xstart)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="limit: expected a positive number, got 0"):
        ddpm.static_threshold(0.0)
    with pytest.raises(ValueError, match="quantile: expected 0 to 1, got 1.5"):
        ddpm.dynamic_threshold(1.5)
    with pytest.raises(ValueError, match="max_value: expected a positive number, got -1"):
        ddpm.dynamic_threshold(0.9, -1.0)
