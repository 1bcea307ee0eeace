import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_ddpm as ddpm

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(200))
T = np.array([0, 3, 120, 199])


@pytest.fixture
def pair(key):
    return jax.random.normal(key, (2, 4, 5, 6, 3))


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_a_perfect_network_has_no_loss(prediction_type, pair):
    x_start, noise = pair
    target = {
        "epsilon": noise,
        "sample": x_start,
        "v_prediction": ddpm.predict_v(SCHEDULE, x_start, T, noise),
    }[prediction_type]

    def losses(output):
        return ddpm.training_losses(
            SCHEDULE, lambda x, t: output, x_start, T, noise, prediction_type=prediction_type
        )

    np.testing.assert_array_equal(losses(target), np.zeros(4))
    # Off by 1, 2, 3 and 4 everywhere: each sample keeps its own mean square.
    offset = jnp.arange(1.0, 5.0).reshape(4, 1, 1, 1)
    np.testing.assert_allclose(losses(target + offset), [1, 4, 9, 16], rtol=1e-12)


def test_network_sees_x_t_and_the_training_timestep(pair):
    x_start, noise = pair
    seen = {}

    def denoise_fn(x, t):
        seen.update(x=x, t=t)
        return x

    short = ddpm.respace(SCHEDULE, [5, 60, 110, 199])
    ddpm.training_losses(short, denoise_fn, x_start, np.arange(4), noise)
    np.testing.assert_array_equal(seen["t"], [5, 60, 110, 199])
    np.testing.assert_allclose(
        seen["x"], ddpm.q_sample(SCHEDULE, x_start, seen["t"], noise), rtol=1e-12
    )


def test_jit_vmap_and_no_second_compilation(pair):
    x_start, noise = pair
    jitted = jax.jit(
        lambda x, t, noise: ddpm.training_losses(SCHEDULE, lambda x, t: jnp.sin(x), x, t, noise)
    )
    expected = ddpm.training_losses(SCHEDULE, lambda x, t: jnp.sin(x), x_start, T, noise)
    np.testing.assert_allclose(jitted(x_start, T, noise), expected, rtol=1e-12)
    jitted(noise, T, x_start)
    assert jitted._cache_size() == 1
    several = jax.vmap(jitted)(pair, np.stack([T, T]), pair[::-1])
    np.testing.assert_allclose(several[0], expected, rtol=1e-12)


def test_bad_policy_is_named(untyped, pair):
    with pytest.raises(ValueError, match="loss_type: expected one of 'mse'.* got 'l1'"):
        ddpm.training_losses(SCHEDULE, lambda x, t: x, pair[0], T, pair[1], loss_type="l1")
