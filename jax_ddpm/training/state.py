"""A pure training step with an average of the weights: Ho et al. 2020, Algorithm 1."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Array, Int

from jax_ddpm._errors import (
    FieldError,
    check_between,
    check_floats,
    check_function,
    check_key,
    check_shape,
    check_whole,
    described,
)
from jax_ddpm._typing import PRNGKey, Sample
from jax_ddpm.losses import LossType, Weighting, check_loss, training_losses
from jax_ddpm.reverse import PredictionType, VarianceType, check_prediction
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal

Params = Any
Batch = Any
"""Images [batch, …], float in [-1, 1] or uint8, or a tuple or list `(images, conditions)`."""
ApplyFn = Callable[..., Any]
"""`(params, x_t, t[, conditions]) -> output`, such as the `apply` of a Flax module."""
_BELOW_1 = float(np.nextafter(1, 0))


class TrainState(NamedTuple):
    """All that a training step reads and returns.

    Attributes:
      step: the number of steps taken, int32 [].
      params, ema_params: the weights, a tree of arrays, and their exponential moving average.
      opt_state: the optimizer's state.
      key: typed key; it never changes, as each step folds its number into it.
    """

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    key: PRNGKey

    def __repr__(self) -> str:
        count = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        return f"TrainState(step={self.step}, {count:,} parameters)"


def ema_warmup(decay: float = 0.9999) -> optax.Schedule:
    """An EMA decay that grows with the step: min(decay, (1 + step) / (10 + step)).

    The average forgets the initial weights within a tenth of the steps taken; with a constant
    0.9999, they make up 94 % of it after 600. Source: TensorFlow's `ExponentialMovingAverage`.

    Args:
      decay: the highest decay, 0 or more and below 1; otherwise a `FieldError` is raised.

    Examples:
      >>> decay = ddpm.ema_warmup(0.9999)
      >>> [round(float(decay(step)), 4) for step in (0, 90, 10**6)]
      [0.1, 0.91, 0.9999]
    """
    check_between("decay", decay, 0, _BELOW_1)
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def init_train_state(
    key: PRNGKey, params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; the average starts as the weights themselves.

    Args:
      key: typed key, for t, noise and dropout of all steps.
      params: the weights, a tree of arrays; they are copied, so the state can be donated.
      optimizer: an Optax optimizer.

    Raises:
      FieldError: `key` is no typed key, or a leaf of `params` is no array.
    """
    check_key("key", key)
    for leaf in [params] if params is None else jax.tree.leaves(params):
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            raise FieldError("params", f"expected a tree of arrays, got {described(leaf)}")
    params, ema_params = (jax.tree.map(jnp.array, params) for _ in range(2))
    opt_state = optimizer.init(params)
    return TrainState(jnp.int32(0), params, ema_params, opt_state, jax.random.clone(key))


def make_train_step(
    schedule: NoiseSchedule,
    apply_fn: ApplyFn,
    optimizer: optax.GradientTransformation,
    *,
    ema_decay: float | optax.Schedule | None = None,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    loss_type: LossType | None = None,
    weighting: None | Weighting = None,
    min_snr_gamma: float = 5.0,
    null_label: Any = None,
    label_dropout: float = 0.1,
    dropout: bool = False,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
    per_sample: bool = False,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]:
    """A training step, `(state, batch) -> (state, metrics)`: Ho et al. 2020, Algorithm 1.

    A batch is images [batch, …], or `(images, conditions)` where `apply_fn` takes conditions: uint8
    is scaled to [-1, 1], floats must be in [-1, 1]. The loss is the mean of `training_losses`. Clip
    gradients in the optimizer. `lax.scan(train_step, state, batches)` takes many steps in one
    dispatch; `runs.save_state` saves the state. Warns if the last x_t of `schedule` is not noise.

    Args:
      schedule: the chain's tables.
      apply_fn: `(params, x_t, t[, conditions]) -> output`, such as a Flax module's `apply`.
      optimizer: an Optax optimizer.
      ema_decay: d in `ema = d * ema + (1 - d) * params` (§4), a number or a function of the step
        number, from 0. Default: `ema_warmup(0.9999)`.
      prediction_type, variance_type, loss_type, weighting, min_snr_gamma: as in `training_losses`.
      null_label: the condition that stands for none, a number or an array like one sample's
        condition, for classifier-free guidance (Ho & Salimans 2022, Algorithm 1). For labels
        0 … K - 1 it is K, and an embedding needs K + 1 rows.
      label_dropout: the share of samples that get `null_label` in place of their condition.
      dropout: also pass `train=True` and `rngs={"dropout": key}` to `apply_fn`.
      accumulate: the number of parts of the batch, computed in turn to save memory. Loss and
        gradient are the means over the parts. (Dropout draws other numbers.)
      skip_nonfinite: a step whose loss, gradient or update is not finite changes nothing but the
        step number, and its `grad_norm` is not finite.
      per_sample: also return the `losses` [batch] and `t` [batch].

    Returns:
      A pure function. Its metrics are the `loss` [] and `grad_norm` [], the global norm of the
        gradient before the update.

    Raises:
      FieldError: an option does not fit the others, or the batch does not fit the options.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> apply_fn, optimizer = lambda params, x_t, t: params * x_t, optax.sgd(0.1)
      >>> state = ddpm.init_train_state(jax.random.key(0), jnp.ones(()), optimizer)
      >>> step = jax.jit(ddpm.make_train_step(schedule, apply_fn, optimizer), donate_argnums=0)
      >>> state, metrics = step(state, np.zeros((4, 8, 8, 3)))
      >>> int(state.step), sorted(metrics)
      (1, ['grad_norm', 'loss'])
    """
    check_prediction(schedule, prediction_type)
    check_function("apply_fn", apply_fn)
    check_between("label_dropout", label_dropout, 0, 1)
    check_whole("accumulate", accumulate, 1)
    warn_of_signal(schedule)
    check_loss(loss_type, weighting, variance_type)
    decay = ema_warmup() if ema_decay is None else ema_decay
    if not callable(decay):
        check_between("ema_decay", decay, 0, _BELOW_1)
        decay = optax.constant_schedule(decay)
    policy: Any = {"prediction_type": prediction_type, "variance_type": variance_type}
    policy |= {"loss_type": loss_type, "weighting": weighting, "min_snr_gamma": min_snr_gamma}

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        images, *conditions = _unpacked(batch)
        t, noise = draw_step(state, schedule, images)
        *_, label_key, dropout_key = _keys(state)
        if null_label is not None:
            if not conditions:
                raise FieldError("null_label", "the batch has no conditions that it could replace")
            dropped = jax.random.bernoulli(label_key, label_dropout, images.shape[:1])
            conditions = jax.tree.map(partial(_dropped, dropped, null_label), conditions)

        def loss_and_grads(part, key):
            images, t, noise, *conditions = part
            options = {"train": True, "rngs": {"dropout": key}} if dropout else {}

            def loss_fn(params):
                def denoise_fn(x_t, t):
                    return apply_fn(params, x_t, t, *conditions, **options)

                losses = training_losses(schedule, denoise_fn, images, t, noise, **policy)
                return jnp.mean(losses), losses

            (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
            return (loss, grads), losses

        parts = (images, t, noise, *conditions)
        (loss, grads), losses = _mean_over_parts(loss_and_grads, parts, dropout_key, accumulate)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        rate = 1 - decay(state.step)
        rates = jax.tree.map(lambda x: jnp.asarray(rate, x.dtype), params)
        ema_params = jax.tree.map(optax.incremental_update, params, state.ema_params, rates)
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        metrics |= {"losses": losses, "t": t} if per_sample else {}
        new = TrainState(state.step + 1, params, ema_params, opt_state, state.key)
        if skip_nonfinite:
            sizes = jnp.stack([loss, metrics["grad_norm"], optax.tree.norm(updates)])
            finite, unchanged = jnp.all(jnp.isfinite(sizes)), state._replace(step=new.step)
            new = jax.tree.map(partial(jnp.where, finite), new, unchanged)
            metrics["grad_norm"] = jnp.where(finite, metrics["grad_norm"], jnp.nan)
        return new, metrics

    return train_step


def _unpacked(batch: Batch) -> list[Any]:
    """Images as floats in [-1, 1], and the conditions, if any, as a tree of arrays."""
    images, *conditions = batch if isinstance(batch, tuple | list) else (batch,)

    def scaled(x):  # bytes of another rank are labels; rounded once, as on the host
        is_image = getattr(x, "dtype", None) == np.uint8 and x.ndim == np.ndim(images)
        return (jnp.asarray(x, jnp.float32) - 127.5) / 127.5 if is_image else x

    images, *conditions = jax.tree.map(scaled, [images, *conditions])
    check_floats("batch", images, np.shape(images))
    for leaf in jax.tree.leaves(conditions):
        check_shape("batch", leaf, (len(images), *jnp.shape(leaf)[1:]))
    return jax.tree.map(jnp.asarray, [images, *conditions])


def _dropped(dropped: Array, null_label: Any, condition: Array) -> Array:
    """The conditions, with the null label for the samples that are `dropped` [batch]."""
    null, shape = np.asarray(null_label), condition.shape[1:]
    check_shape("null_label", null, (), shape)
    if not np.array_equal(null, null.astype(condition.dtype)):
        raise FieldError("null_label", f"expected {condition.dtype}, got {null_label!r}")
    dropped = dropped.reshape(-1, *[1] * len(shape))
    return jnp.where(dropped, null.astype(condition.dtype), condition)


def _mean_over_parts(function: Callable, batch: Any, key: PRNGKey, parts: int) -> Any:
    """`function(batch, key) -> (means, values per sample)` over equal parts of the batch in turn:
    the average of the means, and the values in the order of the batch."""
    if parts == 1:
        return function(batch, key)
    size = len(batch[0])
    if size % parts:
        raise FieldError("accumulate", f"expected a divisor of the batch of {size}, got {parts}")

    def split(x):  # part k takes samples k, k + parts, …: a share of every device's
        return jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1)

    def step(total, inputs):
        means, values = function(*inputs)
        return jax.tree.map(jnp.add, total, means), values

    inputs = (jax.tree.map(split, batch), jax.random.split(key, parts))
    shapes, _ = jax.eval_shape(function, *jax.tree.map(lambda x: x[0], inputs))
    total, values = lax.scan(step, jax.tree.map(jnp.zeros_like, shapes), inputs)
    return jax.tree.map(lambda x: x / parts, total), jnp.swapaxes(values, 0, 1).reshape(size)


def draw_step(state: TrainState, schedule: NoiseSchedule, batch: Sample) -> tuple[Array, Array]:
    """The t [batch], uniform in 0 … T - 1, and the noise that a training step draws at `state`.

    Args:
      state, schedule: those of the step from `make_train_step`.
      batch: images [batch, …], floats; the noise has their shape and dtype.
    """
    t_key, noise_key, _, _ = _keys(state)
    t = jax.random.randint(t_key, batch.shape[:1], 0, schedule.num_timesteps)
    return t, jax.random.normal(noise_key, batch.shape, batch.dtype)


def _keys(state: TrainState) -> Array:
    """The keys of t, the noise, the dropped labels and dropout."""
    return jax.random.split(jax.random.fold_in(state.key, state.step), 4)
