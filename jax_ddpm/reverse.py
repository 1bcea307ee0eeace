"""One reverse step: what the network's output says about p_θ(x_{t-1} | x_t).

    x̂_0 from the output                                  ε, x_0 or v, see `forward`
    p_θ(x_{t-1} | x_t) = N(μ̃_t(x_t, x̂_0), Σ_θ)           Ho et al. 2020, eq. 1, 7, 11

Σ_θ is fixed or learned, and x̂_0 may be clipped: see `p_mean_variance`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from inspect import signature
from typing import Any, Literal, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from jax_ddpm._errors import (
    FieldError,
    check_between,
    check_choice,
    check_denoisers,
    check_floats,
    check_positive,
    check_schedule,
)
from jax_ddpm._typing import Clipping, DenoiseFn, Sample, Timestep
from jax_ddpm.forward import (
    predict_eps_from_xstart,
    predict_xstart_from_eps,
    predict_xstart_from_v,
    q_posterior_mean_variance,
)
from jax_ddpm.schedule import NoiseSchedule, check_entries, extract, look_up, per_sample

F = TypeVar("F", bound=Callable)

PredictionType = Literal["epsilon", "sample", "v_prediction"]
VarianceType = Literal["fixed_small", "fixed_large", "learned", "learned_range"]
_SAMPLES = ("state", "x_T", "x_t", "x_start", "x_a", "x_b", "a", "b")


def in_float32(function: F) -> F:
    """Runs the update in float32 for samples of sixteen bits; the network sees, and the caller gets
    back, their own dtype.

    Sixteen bits do not resolve a step of a long chain, and float16 overflows at 1/√ᾱ.
    """

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature(function).bind(*args, **kwargs)
        given = bound.arguments
        samples = {name: given[name] for name in _SAMPLES if name in given}
        dtypes = [getattr(leaf, "dtype", None) for leaf in jax.tree.leaves(samples)]
        narrow = next((each for each in (jnp.bfloat16, jnp.float16) if each in dtypes), None)
        if narrow is None:
            return function(*args, **kwargs)

        def change(old, new, tree):
            def one(x):
                return jnp.asarray(x, new) if getattr(x, "dtype", None) == old else x

            return jax.tree.map(one, tree)

        given |= change(narrow, np.float32, samples)
        if denoise_fn := given.get("denoise_fn"):
            check_denoisers(denoise_fn=denoise_fn)
            given["denoise_fn"] = lambda x_t, t: denoise_fn(x_t.astype(narrow), t)
        return change(np.float32, narrow, function(*bound.args, **bound.kwargs))

    return cast(F, call)


class PMeanVariance(NamedTuple):
    """Moments of p_θ(x_{t-1} | x_t), as `p_mean_variance` returns them, each in the shape of x_t.

    Attributes:
      mean: of x_{t-1}: the posterior's mean for x̂_0.
      variance, log_variance: Σ_θ and its logarithm, the same for all pixels unless learned.
      pred_xstart: x̂_0, clipped as `clip_denoised` says.
    """

    mean: Array
    variance: Array
    log_variance: Array
    pred_xstart: Array


class Prediction(NamedTuple):
    """The fields of `PMeanVariance`, and the network's ε, which rules of sampling may need."""

    mean: Array
    variance: Array
    log_variance: Array
    pred_xstart: Array
    eps: Array
    """From x̂_0 before `clip_denoised`."""


def denoise(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_t: Sample,
    t: Timestep,
    variance_type: VarianceType = "fixed_small",
) -> tuple[Array, Array]:
    """Run the network at entry `t`: its output, and the channels of a learned variance.

    The network gets the training timestep `schedule.timesteps[t]`, int32 [batch]. Raises
    `ValueError` unless the output has the shape of `x_t`, with twice its channels if learned.
    """
    check_denoisers(denoise_fn=denoise_fn)
    check_floats("x_t", x_t, jnp.shape(x_t))
    check_choice("variance_type", variance_type, VarianceType)
    check_entries(t, schedule.num_timesteps, jnp.shape(x_t))
    x_t, entries = jnp.asarray(x_t), jnp.broadcast_to(t, jnp.shape(x_t)[:1])
    timesteps = jnp.asarray(schedule.timesteps, jnp.int32)
    output = denoise_fn(x_t, look_up(timesteps, entries, x_t))
    return split_output("denoise_fn", output, x_t, variance_type.startswith("learned"))


def split_output(
    name: str, output: Any, x_t: Array, learned: bool | None = None
) -> tuple[Array, Array]:
    """The channels of x_t and those of a learned variance, if any, in the dtype of x_t."""
    *event, channels = x_t.shape
    if learned is None:
        learned = jnp.shape(output) == (*event, 2 * channels)
    check_floats(f"output of {name}", output, (*event, channels * (1 + learned)))
    output = output.astype(x_t.dtype)
    return output[..., :channels], output[..., channels:]


@in_float32
def p_mean_variance(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_t: Sample,
    t: Timestep,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = True,
) -> PMeanVariance:
    """Moments of p_θ(x_{t-1} | x_t), Ho et al. 2020, eq. 1 with the mean of eq. 7.

    At t = 0, `"fixed_small"` has variance 0 and the log-variance of entry 1, and `"fixed_large"`
    has variance and log-variance of entry 1, as in OpenAI's code.

    Args:
      schedule: the chain's tables.
      denoise_fn: `(x_t, t) -> output`, with t the training timestep, int32 [batch].
      x_t: the state, [batch, …].
      t: entries of the chain, 0 … T - 1, [batch] or [].
      prediction_type: whether the output is ε, x_0 (`"sample"`) or v.
      variance_type: β̃_t (`"fixed_small"`), β_t (`"fixed_large"`), or from the output's second half
        of channels: log Σ (`"learned"`), or its place between the two, from -1 to 1
        (`"learned_range"`, Nichol & Dhariwal 2021, eq. 15).
      clip_denoised: whether x̂_0 is clipped to [-1, 1], or a function that does it instead, such as
        `dynamic_threshold()`.

    Raises:
      ValueError: a choice, a shape or a concrete `t` does not fit, or ε is predicted where x_T is
        pure noise (ᾱ_T = 0).

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> x_t, t = jnp.ones((2, 8, 8, 1)), jnp.array([0, 999])
      >>> p = ddpm.p_mean_variance(schedule, lambda x_t, t: 0.1 * x_t, x_t, t)
      >>> p.mean.shape, float(p.variance[0].max())
      ((2, 8, 8, 1), 0.0)
    """
    policy = (prediction_type, variance_type, clip_denoised)
    return PMeanVariance(*predict(schedule, denoise_fn, *policy, x_t, t)[:4])


def check_prediction(schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
    """Raises `FieldError` for an unknown choice, and for ε on a schedule of zero terminal SNR: x_T
    is ε there, and holds nothing of x_0."""
    check_schedule(schedule)
    check_choice("prediction_type", prediction_type, PredictionType)
    table = schedule.alphas_cumprod
    known = prediction_type == "epsilon" and not isinstance(table, Tracer)
    if known and np.asarray(table)[-1] == 0:
        expected = "'sample' or 'v_prediction' on a schedule of zero terminal SNR"
        raise FieldError("prediction_type", f"expected {expected}, got 'epsilon'")


def predict(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    prediction_type: PredictionType,
    variance_type: VarianceType,
    clip_denoised: Clipping,
    x_t: Sample,
    t: Timestep,
) -> Prediction:
    """`p_mean_variance`, and the network's ε."""
    check_prediction(schedule, prediction_type)
    if not callable(clip_denoised) or isinstance(clip_denoised, type):
        check_choice("clip_denoised", clip_denoised, (True, False))
    output, values = denoise(schedule, denoise_fn, x_t, t, variance_type)
    if prediction_type == "epsilon":
        eps, x_start = output, predict_xstart_from_eps(schedule, x_t, t, output)
    else:
        is_v = prediction_type == "v_prediction"
        x_start = predict_xstart_from_v(schedule, x_t, t, output) if is_v else output
        eps = predict_eps_from_xstart(schedule, x_t, t, x_start)
    if callable(clip_denoised):
        x_start = clip_denoised(x_start)
    elif clip_denoised:
        x_start = jnp.clip(x_start, -1, 1)
    mean, variance, log_variance = q_posterior_mean_variance(schedule, x_start, x_t, t)
    if variance_type != "fixed_small":
        log_beta = extract(schedule.log_betas, t, x_t)
        if variance_type == "fixed_large":
            first = extract(jnp.arange(schedule.num_timesteps) == 0, t, x_t)
            log_variance = jnp.where(first > 0, log_variance, log_beta)
        elif variance_type == "learned":
            log_variance = values
        else:
            fraction = (values + 1) / 2
            log_variance = fraction * log_beta + (1 - fraction) * log_variance
        variance = jnp.exp(log_variance)
    return Prediction(mean, variance, log_variance, x_start, eps)


@dataclass(frozen=True)
class StaticThreshold:
    """Clip x_0 to ±`limit` (diffusers' `clip_sample_range`); a value of `clip_denoised`.

    Attributes:
      limit: a positive number.

    Examples:
      >>> ddpm.static_threshold(2.0)(jnp.array([[-3.0, 0.5]])).tolist()
      [[-2.0, 0.5]]
    """

    limit: float

    def __post_init__(self) -> None:
        check_positive(limit=self.limit)

    def __call__(self, x_start: Array) -> Array:
        return jnp.clip(x_start, -self.limit, self.limit)


@dataclass(frozen=True)
class DynamicThreshold:
    """Clip x_0 to ±s and divide by s (Saharia et al. 2022, §2.3); a value of `clip_denoised`.

    For each sample, s is a quantile of |x_0|, at least 1 and at most `max_value`. With the default
    `max_value`, which is diffusers', s is 1 and this clips to [-1, 1].

    Attributes:
      quantile: in [0, 1]; diffusers' `dynamic_thresholding_ratio`.
      max_value: a positive number; diffusers' `sample_max_value`.

    Examples:
      >>> ddpm.dynamic_threshold(1.0, max_value=8.0)(jnp.array([[-4.0, 2.0], [0.5, 0.25]])).tolist()
      [[-1.0, 0.5], [0.5, 0.25]]
    """

    quantile: float = 0.995
    max_value: float = 1.0

    def __post_init__(self) -> None:
        check_between("quantile", self.quantile, 0, 1)
        check_positive(max_value=self.max_value)

    def __call__(self, x_start: Array) -> Array:
        magnitude = jnp.sort(jnp.abs(x_start).reshape(x_start.shape[0], -1), axis=-1)
        # The position is computed on the host, with more digits than float32 has.
        position = self.quantile * (magnitude.shape[1] - 1)
        low, high = math.floor(position), math.ceil(position)
        between = magnitude[:, low] + (position - low) * (magnitude[:, high] - magnitude[:, low])
        s = per_sample("s", jnp.minimum(jnp.maximum(between, 1), self.max_value), x_start)
        return jnp.clip(x_start, -s, s) / s
