"""Guidance: a denoiser made of others, `DenoiseFn -> DenoiseFn`. No sampler knows of it.

    ε̃ = ε(x_t, y) + w (ε(x_t, y) - ε(x_t))                      Ho & Salimans 2022, eq. 6
    ε̂ = ε(x_t) - s √(1 - ᾱ_t) ∇ log p(y | x_t)                  Dhariwal & Nichol 2021, Alg. 2
    p(y | x_t) ≈ p(y | x̂_0(x_t))                                Chung et al. 2023, Theorem 1

The first is linear, so it holds for x_0 and v as it stands. The third needs no classifier of noisy
images, and is what inverse problems are solved with. Where the network also predicts a
variance (2C channels for C of x_t), only the first C are guided.
"""

from collections.abc import Callable
from numbers import Real
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import vjp
from jax.core import Tracer
from jaxtyping import Array

from jax_ddpm._checks import check_finite, check_shape, check_type, checked
from jax_ddpm._typing import DenoiseFn, Output, ThresholdFn, Weight
from jax_ddpm.reverse import PredictionType, p_mean_variance
from jax_ddpm.schedule import NoiseSchedule, extract, per_sample

__all__ = ["classifier_free_guidance", "classifier_guidance", "reconstruction_guidance"]


@checked
def classifier_free_guidance(
    conditional: DenoiseFn,
    unconditional: DenoiseFn,
    scale: Weight,
    *,
    rescale: float = 0.0,
    interval: tuple[Real, Real] | None = None,
) -> DenoiseFn:
    """Ho & Salimans 2022, eq. 6, with `scale` = w + 1 (as diffusers'): 1 is the conditional
    network, 0 the unconditional one.

    Each network is run on the batch as it is. Doubling the batch, to run one network once, would
    move samples between the devices that it is sharded over, twice a step.

    Args:
      conditional, unconditional: any output type, the same for both.
      scale: one number, or one a sample; may be traced.
      rescale: φ of Lin et al. 2024, eq. 15 and 16: how far each sample's standard deviation is
        led back to that of the conditional output.
      interval: first and last training timestep that are guided, both included; elsewhere the
        output is the conditional one (Kynkäänniemi et al. 2024).

    Raises:
      ValueError: `scale` is not finite, `rescale` not in [0, 1], or `interval` or a shape is wrong.
    """
    check_finite("scale", scale)
    if not 0 <= rescale <= 1:
        raise ValueError(f"rescale: expected 0 to 1, got {rescale}")
    if interval is not None and not interval[0] <= interval[1]:
        raise ValueError(f"interval: expected (low, high) with low <= high, got {interval}")

    def denoise_fn(x_t, t):
        output = conditional(x_t, t)
        eps, rest = _split("conditional", output, x_t)
        eps_unconditional, _ = _split("unconditional", unconditional(x_t, t), x_t)
        weight = per_sample("scale", scale, x_t) - 1
        if interval is not None:
            inside = (interval[0] <= t) & (t <= interval[1])
            weight = weight * per_sample("t", inside.astype(x_t.dtype), x_t)
        guided = eps + weight * (eps - eps_unconditional)
        if rescale:
            pixels = tuple(range(1, x_t.ndim))
            ratio = eps.std(pixels, keepdims=True) / guided.std(pixels, keepdims=True)
            guided = guided * (1 + rescale * (ratio - 1))
        return jnp.concatenate([guided, rest], axis=-1)

    return denoise_fn


@checked
def classifier_guidance(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    log_prob_fn: Callable[[Array, Array], Array],
    scale: Weight = 1.0,
    *,
    prediction_type: PredictionType = "epsilon",
) -> DenoiseFn:
    """Dhariwal & Nichol 2021, Algorithm 2: lead x_t where a classifier finds its label.

    Shifting ε by δ shifts the x_0 that it stands for by -δ √(1 - ᾱ_t) / √ᾱ_t, and v by δ / √ᾱ_t.
    Where ᾱ_t = 0, x_t says nothing of the label, and nothing is shifted.

    Args:
      schedule: the one of training, not a `respace`d one, since t is the training timestep.
      denoise_fn: the network, of output `prediction_type`.
      log_prob_fn: `(x_t, t) -> log p(y | x_t)`, [batch], of a classifier that knows noise.
      scale: s, one number or one a sample; may be traced.

    Raises:
      ValueError: a choice, `scale` or a shape does not fit, or `schedule` is not one of training.
    """
    _check_training(schedule)
    check_finite("scale", scale)

    def guided_fn(x_t, t):
        output = denoise_fn(x_t, t)
        log_prob, pullback = vjp(lambda x: log_prob_fn(x, t), x_t)
        score = _score(log_prob, pullback, x_t)
        return _shifted(schedule, output, x_t, t, scale, score, prediction_type)

    return guided_fn


@checked
def reconstruction_guidance(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    log_prob_fn: Callable[[Array, Array], Array],
    scale: Weight = 1.0,
    *,
    prediction_type: PredictionType = "epsilon",
    clip_denoised: bool | ThresholdFn = True,
) -> DenoiseFn:
    """Lead x_t where its x̂_0 agrees with a measurement: Chung et al. 2023 (DPS), Theorem 1; Ho
    et al. 2022b, eq. 7.

    The gradient goes through the network, which is run once. DPS follows the gradient of
    -‖y - A(x̂_0)‖ with a step size of its own; Ho et al. that of -‖y - A(x̂_0)‖² ᾱ_t / 2(1 - ᾱ_t).

    Args:
      schedule: the one of training, not a `respace`d one, since t is the training timestep.
      denoise_fn: the network, of output `prediction_type`.
      log_prob_fn: `(x_start, t) -> log p(y | x_0)`, [batch], up to a constant.
      scale: s, one number or one a sample; may be traced.
      clip_denoised: whether `log_prob_fn` sees x̂_0 clipped, or by what, as in `p_mean_variance`.
        Where it is clipped its gradient is 0.

    Raises:
      ValueError: a choice, `scale` or a shape does not fit, or `schedule` is not one of training.
    """
    _check_training(schedule)
    check_finite("scale", scale)

    def guided_fn(x_t, t):
        def of_reconstruction(x):
            output = denoise_fn(x, t)
            eps, _ = _split("denoise_fn", output, x)
            x_start = p_mean_variance(
                schedule,
                lambda x, t: eps,
                x,
                t,
                prediction_type=prediction_type,
                clip_denoised=clip_denoised,
            ).pred_xstart
            return log_prob_fn(x_start, t), output

        log_prob, pullback, output = vjp(of_reconstruction, x_t, has_aux=True)
        score = _score(log_prob, pullback, x_t)
        return _shifted(schedule, output, x_t, t, scale, score, prediction_type)

    return guided_fn


def _check_training(schedule: NoiseSchedule) -> None:
    timesteps = schedule.timesteps
    if not isinstance(timesteps, Tracer) and np.any(timesteps != np.arange(timesteps.size)):
        raise ValueError(f"schedule: expected the training schedule, got timesteps {timesteps}")


def _score(log_prob: Array, pullback: Callable[[Array], Any], x_t: Array) -> Array:
    """∇ log p of every sample."""
    check_type("output of log_prob_fn", log_prob, Output)
    check_shape("output of log_prob_fn", log_prob, x_t.shape[:1])
    # A pullback of ones, not the gradient of a sum over the batch, which devices share.
    (score,) = pullback(jnp.ones_like(log_prob))
    return score


def _shifted(
    schedule: NoiseSchedule,
    output: Any,
    x_t: Array,
    t: Array,
    scale: Weight,
    score: Array,
    prediction_type: PredictionType,
) -> Array:
    """The output, led along the score: Algorithm 2, in ε, x_0 or v."""
    predicted, rest = _split("denoise_fn", output, x_t)
    wide = x_t.astype(np.promote_types(x_t.dtype, np.float32))  # 1/√ᾱ may not fit sixteen bits
    sigma = extract(schedule.sqrt_one_minus_alphas_cumprod, t, wide)
    recip_alpha = extract(schedule.sqrt_recip_alphas_cumprod, t, wide)
    recip_alpha = jnp.where(jnp.isfinite(recip_alpha), recip_alpha, 0)
    shift = {
        "epsilon": -sigma,
        "sample": sigma * sigma * recip_alpha,
        "v_prediction": -sigma * recip_alpha,
    }[prediction_type]
    shift = per_sample("scale", scale, wide) * shift * score.astype(wide.dtype)
    guided = predicted.astype(wide.dtype) + shift
    return jnp.concatenate([guided.astype(x_t.dtype), rest], axis=-1)


def _split(name: str, output: Array, x_t: Array) -> tuple[Array, Array]:
    """The channels of x_t and the rest, in the dtype of x_t, in which guidance is computed."""
    check_type(f"output of {name}", output, Output)
    channels = x_t.shape[-1]
    output = output.astype(x_t.dtype)
    check_shape(f"output of {name}", output[..., :channels], x_t.shape)
    return output[..., :channels], output[..., channels:]
