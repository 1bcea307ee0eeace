from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jax_ddpm as ddpm
from jax_ddpm.training import draw_step

SCHEDULE = ddpm.make_schedule(ddpm.linear_beta_schedule(50))
OPTIMIZER = optax.sgd(0.5)


def apply_fn(params, x, t, y=0):
    return params["w"] * x + jnp.mean(y)


def make_step(apply_fn=apply_fn, optimizer=OPTIMIZER, **options):
    return ddpm.make_train_step(SCHEDULE, apply_fn, optimizer, **options)


draw = jax.jit(lambda state, batch: draw_step(state, SCHEDULE, batch))


@pytest.fixture
def batch():
    return np.random.default_rng(0).normal(size=(16, 4, 4, 1))


@pytest.fixture
def state(key):
    return ddpm.init_train_state(key, {"w": jnp.ones(())}, OPTIMIZER)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_one_step_is_gradient_descent_on_the_mean_loss(state, batch, accumulate):
    """The loss is a parabola in w, so its derivative is exact: 2 mean((w x_t - ε) x_t). In parts
    it is the same step, and each sample's loss stands in the order of the batch."""
    t, noise = map(np.asarray, draw(state, batch))
    alpha_bar = SCHEDULE.alphas_cumprod[t].reshape(16, 1, 1, 1)
    x_t = np.sqrt(alpha_bar) * batch + np.sqrt(1 - alpha_bar) * noise
    options = {"ema_decay": 0.9, "accumulate": accumulate, "per_sample": True}
    new, metrics = jax.jit(make_step(**options))(state, batch)
    gradient = 2 * np.mean((x_t - noise) * x_t)
    np.testing.assert_allclose(metrics["loss"], np.mean((x_t - noise) ** 2), rtol=1e-12)
    np.testing.assert_allclose(metrics["grad_norm"], abs(gradient), rtol=1e-12)
    np.testing.assert_allclose(new.params["w"], 1 - 0.5 * gradient, rtol=1e-12)
    np.testing.assert_allclose(new.ema_params["w"], 1 - 0.1 * 0.5 * gradient, rtol=1e-12)
    np.testing.assert_array_equal(metrics["t"], t)
    losses = np.mean((x_t - noise) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(metrics["losses"], losses, rtol=1e-12)
    assert int(new.step) == 1


def test_a_state_is_a_line_to_read(state):
    state = state._replace(params={"w": np.zeros((2000, 2))})
    assert repr(state) == "TrainState(step=0, 4,000 parameters)"


def test_every_step_draws_anew_and_t_covers_the_chain(state, batch):
    draws = [draw(state._replace(step=np.int32(step)), batch) for step in range(60)]
    assert {int(each) for t, _ in draws for each in t} == set(range(50))
    assert len(np.unique([noise for _, noise in draws])) == 60 * batch.size


def test_the_loss_is_what_was_asked_for(state, batch):
    def twice(params, x, t):
        return params["w"] * jnp.concatenate([x, x], axis=-1)

    policy = {"prediction_type": "sample", "variance_type": "learned_range", "loss_type": "hybrid"}
    policy |= {"weighting": "min_snr", "min_snr_gamma": 2.0}
    _, metrics = jax.jit(make_step(twice, **policy))(state, batch)
    losses = partial(ddpm.training_losses, SCHEDULE, partial(twice, state.params), **policy)
    expected = np.mean(jax.jit(losses)(batch, *draw(state, batch)))
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-12)


def test_an_average_of_the_default_forgets_its_start(state, batch):
    """With the gradient 0 after a jump by 1, the average's distance is the product of the decays,
    Π (1 + k) / (10 + k) = n! 9! / (n + 9)!."""
    step = jax.jit(make_step(optimizer=optax.sgd(0.0)))
    state = state._replace(params={"w": jnp.full((), 2.0)})
    for n in (1, 2, 3):
        state, _ = step(state, batch)
        share = np.prod([(1 + k) / (10 + k) for k in range(n)])
        np.testing.assert_allclose(state.ema_params["w"], 2 - share, rtol=1e-6)
    assert ddpm.ema_warmup()(10**6) == 0.9999


def test_steps_in_one_dispatch_are_the_same_steps(key, batch, no_new_program):
    """A step compiles once. The state is its own: the caller's buffers stay."""
    params = {"w": jnp.ones(())}
    state = ddpm.init_train_state(key, params, OPTIMIZER)
    step, batches = make_step(), np.stack([batch, 2 * batch, 3 * batch])
    scan = jax.jit(lambda state, batches: jax.lax.scan(step, state, batches))
    fused, metrics = scan(state, batches)
    step = jax.jit(step, donate_argnums=0)
    given, (state, expected) = state, step(state, batches[0])
    assert given.params["w"].is_deleted()
    assert not params["w"].is_deleted() and not key.is_deleted()
    losses = [expected["loss"]]
    with no_new_program():
        for each in batches[1:]:
            state, expected = step(state, each)
            losses.append(expected["loss"])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-14)
    np.testing.assert_allclose(fused.params["w"], state.params["w"], rtol=1e-14)


@pytest.mark.parametrize("null", [0, np.arange(12.0).reshape(2, 2, 3)], ids=["number", "array"])
def test_a_whole_condition_is_dropped(state, batch, null):
    conditions, seen = 100 + np.arange(16 * 12.0).reshape(16, 2, 2, 3), []

    def watched(params, x, t, condition):
        jax.debug.callback(lambda given: seen.append(np.asarray(given)), condition)
        return params["w"] * x

    step = jax.jit(make_step(watched, null_label=null, label_dropout=0.2))
    jax.block_until_ready(step(state, (batch, conditions)))
    jax.effects_barrier()
    kept, gone = (np.all(seen[0] == each, axis=(1, 2, 3)) for each in (conditions, null))
    assert np.all(kept ^ gone) and 0 < gone.sum() < kept.sum()


def test_batches_as_loaders_give_them(defaults, key):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), np.uint8)
    labels, floats = np.arange(4), (pixels / 127.5 - 1).astype(np.float32)
    step = jax.jit(make_step())
    state = ddpm.init_train_state(key, {"w": jnp.ones(())}, OPTIMIZER)
    right = step(state, (floats, labels))[1]["loss"]
    for batch in ([floats, labels], (pixels, labels), [pixels, labels]):
        np.testing.assert_allclose(step(state, batch)[1]["loss"], right, rtol=1e-6)


def test_what_is_wrong_is_named(untyped, state, batch):
    pictures = batch, np.zeros((16, 3))
    for step, given, words in (
        (make_step(accumulate=3), batch, "accumulate: expected a divisor of the batch of 16"),
        (make_step(), {"images": batch}, "batch: expected a floating array, got a dict"),
        (make_step(), (batch, np.arange(3)), r"batch: expected shape \(16,\), got"),
        (make_step(null_label=0.5), (batch, np.arange(16)), r"null_label: expected int\d\d, got 0"),
        (make_step(null_label=np.zeros(2)), pictures, r"null_label: expected shape \(\) or \(3,\)"),
        (make_step(null_label=0), batch, "null_label: the batch has no conditions"),
    ):
        with pytest.raises((TypeError, ValueError), match=words):
            jax.eval_shape(step, state, given)
