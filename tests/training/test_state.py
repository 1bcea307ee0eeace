from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jax_ddpm as ddpm
from jax_ddpm.training import draw_step

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(50))
OPTIMIZER = optax.sgd(0.5)


def apply_fn(params, x, t):
    return params["w"] * x


@pytest.fixture
def batch(key):
    return jax.random.normal(key, (16, 4, 4, 1))


@pytest.fixture
def state(key):
    return ddpm.init_train_state(key, {"w": jnp.ones(())}, OPTIMIZER)


def test_one_step_is_gradient_descent_on_the_mean_loss(state, batch):
    """The loss is a parabola in w, so its derivative is exact: 2 mean((w x_t - ε) x_t)."""
    t, noise = draw_step(state, SCHEDULE, batch)
    x_t = ddpm.q_sample(SCHEDULE, batch, t, noise)
    step = jax.jit(ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER, ema_decay=0.9))
    new, metrics = step(state, batch)
    gradient = 2 * np.mean((x_t - noise) * x_t)
    np.testing.assert_allclose(metrics["loss"], np.mean((x_t - noise) ** 2), rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), rtol=1e-12)
    np.testing.assert_allclose(new.params["w"], 1 - 0.5 * gradient, rtol=1e-12)
    np.testing.assert_allclose(new.ema_params["w"], 1 - 0.1 * 0.5 * gradient, rtol=1e-12)
    assert int(new.step) == 1


def test_every_step_draws_anew_and_t_covers_the_chain(state, batch):
    steps = [draw_step(state._replace(step=jnp.int32(k)), SCHEDULE, batch) for k in range(60)]
    drawn = np.concatenate([t for t, _ in steps])
    assert set(drawn) == set(range(50))
    assert np.any(steps[0][1] != steps[1][1])


def test_the_loss_is_what_was_asked_for(state, batch):
    def twice(params, x, t):
        return params["w"] * jnp.concatenate([x, x], axis=-1)

    policy = {
        "variance_type": "learned_range",
        "loss_type": "hybrid",
        "weighting": "min_snr",
        "min_snr_gamma": 2.0,
    }
    _, metrics = jax.jit(ddpm.make_train_step(SCHEDULE, twice, OPTIMIZER, **policy))(state, batch)
    t, noise = draw_step(state, SCHEDULE, batch)

    @jax.jit
    def losses(t, noise):
        denoise_fn = partial(twice, state.params)
        return ddpm.training_losses(SCHEDULE, denoise_fn, batch, t, noise, **policy)

    np.testing.assert_allclose(metrics["loss"], np.mean(losses(t, noise)), rtol=1e-12)


def test_donated_once_and_compiled_once(state, batch):
    step = jax.jit(ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER), donate_argnums=0)
    given = state.params["w"]
    state, _ = step(state, batch)
    step(state, batch)
    assert step._cache_size() == 1 and given.is_deleted()


def test_the_state_does_not_hold_the_callers_buffers(key, batch):
    params = {"w": jnp.ones(())}
    state = ddpm.init_train_state(key, params, OPTIMIZER)
    step = jax.jit(ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER), donate_argnums=0)
    step(state, batch)
    assert not params["w"].is_deleted() and not key.is_deleted()


def test_eight_devices_train_as_one(state, batch):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    step = jax.jit(ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER))
    alone, spread = state, jax.device_put(state, NamedSharding(mesh, P()))
    shards = jax.device_put(batch, NamedSharding(mesh, P("data")))
    for _ in range(5):
        alone, expected = step(alone, batch)
        spread, metrics = step(spread, shards)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-9)
    np.testing.assert_allclose(spread.params["w"], alone.params["w"], rtol=1e-9)


def test_decay_may_follow_a_schedule(state, batch):
    decay = lambda step: jnp.where(step == 0, 0.0, 1.0)  # noqa: E731
    step = jax.jit(ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER, ema_decay=decay))
    first, _ = step(state, batch)
    second, _ = step(first, batch)
    np.testing.assert_array_equal(first.ema_params["w"], first.params["w"])
    np.testing.assert_array_equal(second.ema_params["w"], first.params["w"])


def test_bad_decay_is_named():
    with pytest.raises(ValueError, match="ema_decay: expected 0 to 1, below 1, got 1.5"):
        ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER, ema_decay=1.5)


def test_parts_of_a_batch_make_the_same_step(state, batch):
    whole = ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER)
    parts = ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER, accumulate=4)
    expected, got = jax.jit(whole)(state, batch), jax.jit(parts)(state, batch)
    np.testing.assert_allclose(got[0].params["w"], expected[0].params["w"], rtol=1e-14)
    np.testing.assert_allclose(got[1]["loss"], expected[1]["loss"], rtol=1e-14)
    with pytest.raises(ValueError, match="accumulate: expected a divisor of the batch of 16"):
        ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER, accumulate=3)(state, batch)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_each_samples_loss_and_step(state, batch, accumulate):
    """In the order of the batch, also where it is taken in parts; the network is w x_t, w = 1."""
    options = {"accumulate": accumulate, "per_sample": True}
    step = ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER, **options)
    _, metrics = jax.jit(step)(state, batch)
    t, noise = draw_step(state, SCHEDULE, batch)
    errors = (ddpm.q_sample(SCHEDULE, batch, t, noise) - noise) ** 2
    np.testing.assert_array_equal(metrics["t"], t)
    np.testing.assert_allclose(metrics["losses"], errors.mean(axis=(1, 2, 3)), rtol=1e-12)


def test_steps_in_one_dispatch_are_the_same_steps(state, batch):
    step = ddpm.make_train_step(SCHEDULE, apply_fn, OPTIMIZER)
    batches = jnp.stack([batch, 2 * batch, 3 * batch])
    fused, metrics = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))(
        state, batches
    )
    for number in range(3):
        state, expected = jax.jit(step)(state, batches[number])
        np.testing.assert_allclose(metrics["loss"][number], expected["loss"], rtol=1e-14)
    np.testing.assert_allclose(fused.params["w"], state.params["w"], rtol=1e-14)
