"""One training step, pure: Ho et al. 2020, Algorithm 1, with an average of the weights."""

from collections.abc import Callable, Mapping
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
    FieldTypeError,
    check_apply,
    check_between,
    check_floats,
    check_key,
    check_whole,
    described,
)
from jax_ddpm._typing import AnyArray, PRNGKey, Sample
from jax_ddpm.losses import LossType, Weighting, check_loss, training_losses
from jax_ddpm.reverse import PredictionType, VarianceType, check_prediction
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal

Params = Any
Batch = Any
"""Images [batch, …], float in [-1, 1] or uint8, or `(images, conditions)`, as loaders give them."""
ApplyFn = Callable[..., Any]
"""`(params, x_t, t[, conditions]) -> output`: a Flax module's `apply`, or any function like it."""


class TrainState(NamedTuple):
    """What the next step needs. `key` never changes: each step folds its own number into it."""

    step: Int[Array, ""]
    params: Params
    ema_params: Params
    opt_state: optax.OptState
    key: PRNGKey


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, dict[str, Array]]]


def ema_warmup(decay: float = 0.9999) -> optax.Schedule:
    """A decay of the average of the weights that grows: min(decay, (1 + step) / (10 + step)).

    The average then forgets its start, the initial weights, within a tenth of the steps taken. At
    0.9999 from the first step on, they would still be 94 % of it after 600 steps. (diffusers'
    `EMAModel` has such a warm-up; this one is that of TensorFlow's `ExponentialMovingAverage`.)
    """
    if not 0 <= decay < 1:
        raise ValueError(f"decay: expected 0 to 1, below 1, got {decay}")
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))


def init_train_state(
    key: PRNGKey, params: Params, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step; the average of the weights starts at the weights."""
    check_key("key", key)
    leaves = [params] if params is None else jax.tree.leaves(params)
    for leaf in leaves:
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int):
            expected = "expected a tree of arrays, as model.init makes"
            raise FieldError("params", f"{expected}, got {described(leaf)}")
    # Copies throughout: the state is meant to be donated, and no buffer can be donated twice.
    copy = jax.tree.map(jnp.array, params)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=copy,
        ema_params=jax.tree.map(jnp.array, params),
        opt_state=optimizer.init(copy),
        key=jax.random.clone(key),
    )


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
) -> TrainStep:
    """`(state, batch) -> (state, metrics)`, Ho et al. Algorithm 1, for a batch of images, or of
    `(images, conditions)`; images of uint8, also as conditions, are scaled to [-1, 1], and floats
    are in it already.
    Warns where samples of `schedule` will not start in noise.

    Jit it with the state donated: `jax.jit(train_step, donate_argnums=0)`. Clip gradients in
    the optimizer (`optax.chain(optax.clip_by_global_norm(1.0), …)`). The metrics are the batch's
    mean `loss` and the gradient's global `grad_norm`, both of the weights before the step; with
    `per_sample` also the `losses` [batch] and `t` [batch] of its samples. The loss options are
    those of `training_losses`.

    `ema_decay` d averages the weights as `ema = d * ema + (1 - d) * params` (Ho et al. §4); it
    may depend on the number of the step, from 0, as an Optax schedule does. Default:
    `ema_warmup(0.9999)`, Ho et al.'s 0.9999 but for the first steps.

    Conditions are what the network is told of each sample: its label [batch], or an array [batch,
    …] such as another image. Where there is a `null_label`, one number, or an array of the shape
    of one sample's condition, the share `label_dropout` of the samples get it for their own, so
    that one network learns both sides of classifier-free guidance (Ho & Salimans 2022,
    Algorithm 1); where labels count the classes from 0, it is their number, for which an embedding
    needs one more row. With `dropout`, `apply_fn` also gets `train=True` and a key of the step's
    own in `rngs={"dropout": …}`.

    `accumulate` takes the batch in so many parts, one after the other, for the memory of one:
    loss and gradient are the means over the parts, so the step is the same. (Dropout draws anew,
    and over several devices each part's gradient is summed on its own.)

    With `skip_nonfinite`, a step whose loss, gradient or update is not finite leaves weights,
    average and optimizer as they were, to the bit, and its `grad_norm` is not finite.

    Many steps in one dispatch are a scan over batches:
    `jax.jit(lambda state, batches: lax.scan(train_step, state, batches), donate_argnums=0)`.
    """
    check_prediction(schedule, prediction_type)
    check_apply("apply_fn", apply_fn)
    check_between("label_dropout", label_dropout, 0, 1)
    check_whole("accumulate", accumulate, 1)
    warn_of_signal(schedule)
    check_loss(loss_type, weighting, variance_type)
    if ema_decay is None:
        ema_decay = ema_warmup()
    if not callable(ema_decay) and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay: expected 0 to 1, below 1, got {ema_decay}")

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Array]]:
        images, *conditions = _unpacked(batch)
        t, noise = draw_step(state, schedule, images)
        _, _, label_key, dropout_key = _keys(state)
        if null_label is not None:
            if not conditions:
                raise FieldError("null_label", "the batch has no conditions that it could replace")
            dropped = jax.random.bernoulli(label_key, label_dropout, images.shape[:1])
            conditions = jax.tree.map(partial(_dropped, dropped, null_label), conditions)

        def loss_fn(params, part, dropout_key):
            images, t, noise, *conditions = part
            options = {"train": True, "rngs": {"dropout": dropout_key}} if dropout else {}

            losses = training_losses(
                schedule,
                lambda x_t, t: apply_fn(params, x_t, t, *conditions, **options),
                images,
                t,
                noise,
                prediction_type=prediction_type,
                variance_type=variance_type,
                loss_type=loss_type,
                weighting=weighting,
                min_snr_gamma=min_snr_gamma,
            )
            return jnp.mean(losses), losses

        (loss, grads), losses = _mean_over_parts(
            partial(_loss_and_grads, loss_fn, state.params),
            (images, t, noise, *conditions),
            dropout_key,
            accumulate,
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        decay = ema_decay(state.step) if callable(ema_decay) else ema_decay
        ema_params = jax.tree.map(
            lambda new, old: optax.incremental_update(new, old, jnp.asarray(1 - decay, new.dtype)),
            params,
            state.ema_params,
        )
        metrics = {"loss": loss, "grad_norm": optax.tree.norm(grads)}
        metrics |= {"losses": losses, "t": t} if per_sample else {}
        new = TrainState(state.step + 1, params, ema_params, opt_state, state.key)
        if skip_nonfinite:
            sizes = jnp.stack([loss, metrics["grad_norm"], optax.tree.norm(updates)])
            finite = jnp.all(jnp.isfinite(sizes))
            keep = partial(jax.tree.map, lambda new, old: jnp.where(finite, new, old))
            new = keep(new, state._replace(step=new.step))
            metrics["grad_norm"] = jnp.where(finite, metrics["grad_norm"], jnp.nan)
        return new, metrics

    return train_step


def _loss_and_grads(
    loss_fn: Callable, params: Params, part: Any, key: PRNGKey
) -> tuple[tuple[Array, Params], Array]:
    (loss, losses), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, part, key)
    return (loss, grads), losses


def _unpacked(batch: Batch) -> list[Any]:
    """Images as floats in [-1, 1], and the conditions, each a tree of arrays."""
    if isinstance(batch, Mapping):
        got = f"a dict of {', '.join(map(str, batch))}"
        raise FieldTypeError("batch", f"expected images or (images, conditions), got {got}")
    images, *conditions = batch if isinstance(batch, tuple | list) else (batch,)
    images = _scaled(images, images)
    check_floats("batch", images, jnp.shape(images))
    for leaf in jax.tree.leaves(conditions):
        if jnp.shape(leaf)[:1] != images.shape[:1]:
            expected = f"expected a condition for each of {len(images)} images"
            raise FieldError("batch", f"{expected}, got one of shape {jnp.shape(leaf)}")
    convert = partial(jax.tree.map, lambda leaf: jnp.asarray(_scaled(leaf, images)))
    return [convert(each) for each in (images, *conditions)]


def _scaled(x: Any, images: Any) -> Any:
    """Bytes that are images as floats in [-1, 1]; whatever else as it is."""
    if getattr(x, "dtype", None) != np.uint8 or x.ndim != images.ndim:
        return x
    return (jnp.asarray(x, jnp.float32) - 127.5) / 127.5  # rounded once, as on the host


def _dropped(dropped: Array, null_label: Any, condition: AnyArray) -> Array:
    """The conditions, the null in place of those of samples that are `dropped`."""
    null = np.asarray(null_label)
    if null.shape not in ((), condition.shape[1:]):
        expected = f"expected shape () or {condition.shape[1:]}, as one condition's"
        raise FieldError("null_label", f"{expected}, got {null.shape}")
    if not np.array_equal(null, null.astype(condition.dtype)):
        raise FieldError("null_label", f"expected {condition.dtype}, got {null_label!r}")
    dropped = dropped.reshape(-1, *[1] * (condition.ndim - 1))
    return jnp.where(dropped, null.astype(condition.dtype), condition)


def _mean_over_parts(function: Callable, batch: Any, key: PRNGKey, parts: int) -> Any:
    """The mean of `function(part, key)` over `parts` equal parts of the batch, one at a time. It
    returns a pair, of means and of values per sample; the second are joined in batch order."""
    if parts == 1:
        return function(batch, key)
    size = len(batch[0])
    if size % parts:
        raise ValueError(f"accumulate: expected a divisor of the batch of {size}, got {parts}")

    def split(x):  # part k takes samples k, k + parts, …, so that every device has its share
        return jnp.swapaxes(x.reshape(size // parts, parts, *x.shape[1:]), 0, 1)

    def step(total, part_and_key):
        summed, of_samples = function(*part_and_key)
        return jax.tree.map(jnp.add, total, summed), of_samples

    inputs = (jax.tree.map(split, batch), jax.random.split(key, parts))
    first = jax.tree.map(lambda x: x[0], inputs)
    shapes, _ = jax.eval_shape(function, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    total, of_samples = lax.scan(step, zeros, inputs)
    joined = jnp.swapaxes(of_samples, 0, 1).reshape(size)
    return jax.tree.map(lambda x: x / parts, total), joined


def draw_step(state: TrainState, schedule: NoiseSchedule, batch: Sample) -> tuple[Array, Array]:
    """What the step at `state` draws for `batch`: t uniform in 0 … T - 1, and the noise."""
    t_key, noise_key, _, _ = _keys(state)
    t = jax.random.randint(t_key, batch.shape[:1], 0, schedule.num_timesteps)
    return t, jax.random.normal(noise_key, batch.shape, batch.dtype)


def _keys(state: TrainState) -> Array:
    """One key each for t, the noise, the labels and dropout."""
    return jax.random.split(jax.random.fold_in(state.key, state.step), 4)
