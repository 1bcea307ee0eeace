"""Guidance: denoisers made of denoisers, which every sampler takes as they are.

    ε̃ = ε(x_t, y) + w (ε(x_t, y) - ε(x_t))                      Ho & Salimans 2022, eq. 6
    ε̂ = ε(x_t) - s √(1 - ᾱ_t) ∇ log p(y | x_t)                  Dhariwal & Nichol 2021, Alg. 2
    p(y | x_t) ≈ p(y | x̂_0(x_t))                                Chung et al. 2023, Theorem 1

The first is linear, so it also holds for x_0 and v. The third needs no classifier of noisy images,
and solves inverse problems. If the network also predicts a variance (2C channels for C of x_t),
only the first C channels are guided.
"""

from collections.abc import Callable
from numbers import Real

import jax.numpy as jnp
import numpy as np
from jax import lax, vjp
from jax.core import Tracer
from jaxtyping import Array

from jax_ddpm._errors import (
    FieldError,
    check_between,
    check_choice,
    check_denoisers,
    check_finite,
    check_floats,
    check_schedule,
)
from jax_ddpm._typing import Clipping, DenoiseFn, Weight
from jax_ddpm.reverse import PredictionType, predict, split_output
from jax_ddpm.schedule import NoiseSchedule, extract, per_sample


def classifier_free_guidance(
    conditional: DenoiseFn,
    unconditional: DenoiseFn,
    scale: Weight,
    *,
    rescale: float = 0.0,
    interval: tuple[Real, Real] | None = None,
) -> DenoiseFn:
    """Guidance by the difference of two networks: ε(x_t) + `scale` (ε(x_t, y) - ε(x_t)).

    This is Ho & Salimans 2022, eq. 6, with `scale` = w + 1, as in diffusers: 1 is the conditional
    network, 0 the unconditional one. The result is a `DenoiseFn`: pass it to `p_sample_loop` in the
    network's place. The two networks run one after the other: one run on a doubled batch would move
    samples between devices twice per step.

    Args:
      conditional, unconditional: `(x_t, t) -> output`, of one type of output. Usually one network,
        with the labels and with its null label.
      scale: one number, or one per sample; may be traced.
      rescale: φ of Lin et al. 2024, eq. 15 and 16, in [0, 1]: how far each sample's standard
        deviation is brought back to that of the conditional output.
      interval: the first and the last training timestep with guidance (Kynkäänniemi et al. 2024).
        Where no timestep of the batch is inside, only the conditional network runs; devices agree
        on this by reducing one boolean per step.

    Raises:
      ValueError: `scale` is not finite, or `rescale`, `interval` or a shape does not fit.

    Examples:
      >>> network = lambda x_t, t, labels: x_t * labels[:, None, None, None]  # yours; 0 is no label
      >>> labels = jnp.array([2, 5])
      >>> conditional = lambda x_t, t: network(x_t, t, labels)
      >>> unconditional = lambda x_t, t: network(x_t, t, jnp.zeros_like(labels))
      >>> guided = ddpm.classifier_free_guidance(conditional, unconditional, 3.0)
      >>> guided(jnp.ones((2, 1, 1, 1)), jnp.array([9, 9])).ravel().tolist()  # 0 + 3 (label - 0)
      [6.0, 15.0]
    """
    check_denoisers(conditional=conditional, unconditional=unconditional)
    check_finite("scale", scale)
    check_between("rescale", rescale, 0, 1)
    if interval is not None and not interval[0] <= interval[1]:
        raise FieldError("interval", f"expected (low, high) with low <= high, got {interval}")
    rescale = float(rescale)

    def denoise_fn(x_t, t):
        eps, rest = split_output("conditional", conditional(x_t, t), x_t)
        weight = per_sample("scale", scale, x_t) - 1

        def guide(eps, weight):
            eps_unconditional, _ = split_output("unconditional", unconditional(x_t, t), x_t)
            guided = eps + weight * (eps - eps_unconditional)
            if rescale:
                pixels = tuple(range(1, x_t.ndim))
                ratio = eps.std(pixels, keepdims=True) / guided.std(pixels, keepdims=True)
                guided = guided * (1 + rescale * (ratio - 1))
            return guided

        if interval is None:
            guided = guide(eps, weight)
        else:
            inside = (interval[0] <= t) & (t <= interval[1])
            weight = weight * per_sample("t", inside.astype(x_t.dtype), x_t)
            guided = lax.cond(jnp.any(inside), guide, lambda eps, weight: eps, eps, weight)
        return jnp.concatenate([guided, rest], axis=-1)

    return denoise_fn


def classifier_guidance(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    log_prob_fn: Callable[[Array, Array], Array],
    scale: Weight = 1.0,
    *,
    prediction_type: PredictionType = "epsilon",
) -> DenoiseFn:
    """Guidance by the gradient of a classifier, Dhariwal & Nichol 2021, Algorithm 2: a `DenoiseFn`.

    A shift of ε by δ shifts x_0 by -δ √(1 - ᾱ_t) / √ᾱ_t and v by δ / √ᾱ_t. Where ᾱ_t = 0, x_t holds
    nothing of the label, and the output is not shifted.

    Args:
      schedule: the training schedule, not a `respace`d one, since t is the training timestep.
      denoise_fn: `(x_t, t) -> output`, the network, of output `prediction_type`.
      log_prob_fn: `(x_t, t) -> log p(y | x_t)`, [batch], of a classifier of noisy images.
      scale: s, one number or one per sample; may be traced.
      prediction_type: as in `p_mean_variance`.

    Raises:
      ValueError: a choice, `scale` or a shape does not fit, or `schedule` is respaced.

    Examples:
      >>> schedule, x_t = ddpm.make_schedule([0.75]), jnp.ones((1, 1, 1, 1))
      >>> log_prob_fn = lambda x_t, t: -(x_t**2).sum((1, 2, 3)) / 2  # its gradient is -x_t
      >>> guided = ddpm.classifier_guidance(schedule, lambda x_t, t: 0 * x_t, log_prob_fn)
      >>> round(guided(x_t, jnp.array([0])).item(), 5)  # √0.75
      0.86603
    """
    check_denoisers(denoise_fn=denoise_fn, log_prob_fn=log_prob_fn)

    def run(x, t):
        return log_prob_fn(x, t), denoise_fn(lax.stop_gradient(x), t)

    return _along_the_score(schedule, run, scale, prediction_type)


def reconstruction_guidance(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    log_prob_fn: Callable[[Array, Array], Array],
    scale: Weight = 1.0,
    *,
    prediction_type: PredictionType = "epsilon",
    clip_denoised: Clipping = True,
) -> DenoiseFn:
    """Guidance by a measurement of x̂_0: Chung et al. 2023 (DPS), Theorem 1; Ho et al. 2022b, eq. 7.

    The network runs once, and the gradient passes through it. DPS follows the gradient of
    -‖y - A(x̂_0)‖ with its own step size; Ho et al. that of -‖y - A(x̂_0)‖² ᾱ_t / 2(1 - ᾱ_t).

    Args:
      schedule, denoise_fn, scale, prediction_type: as in `classifier_guidance`.
      log_prob_fn: `(x_start, t) -> log p(y | x_0)`, [batch], up to a constant.
      clip_denoised: as in `p_mean_variance`; clipped pixels of x̂_0 have no gradient.

    Examples:
      >>> measured = jnp.zeros((1, 4, 8, 1))  # the upper half of an image
      >>> log_prob_fn = lambda x_start, t: -((x_start[:, :4] - measured) ** 2).sum((1, 2, 3)) / 2
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> guided = ddpm.reconstruction_guidance(schedule, lambda x_t, t: 0.1 * x_t, log_prob_fn)
      >>> guided(jnp.ones((1, 8, 8, 1)), jnp.array([5])).shape
      (1, 8, 8, 1)
    """
    check_denoisers(denoise_fn=denoise_fn, log_prob_fn=log_prob_fn)
    policy = (prediction_type, "fixed_small", clip_denoised)

    def run(x, t):
        output = denoise_fn(x, t)
        eps, _ = split_output("denoise_fn", output, x)
        x_start = predict(schedule, lambda x, t: eps, *policy, x, t).pred_xstart
        return log_prob_fn(x_start, t), output

    return _along_the_score(schedule, run, scale, prediction_type)


def _along_the_score(
    schedule: NoiseSchedule,
    run: Callable[[Array, Array], tuple[Array, Array]],
    scale: Weight,
    prediction_type: PredictionType,
) -> DenoiseFn:
    """Algorithm 2 for ε, x_0 or v: of `run(x_t, t) -> (log p, output)` the output, shifted."""
    check_schedule(schedule)
    check_finite("scale", scale)
    check_choice("prediction_type", prediction_type, PredictionType)
    timesteps = schedule.timesteps
    if not isinstance(timesteps, Tracer) and np.any(timesteps != np.arange(timesteps.size)):
        raise FieldError("schedule", f"expected that of training, got timesteps {timesteps}")

    def guided_fn(x_t, t):
        log_prob, pullback, output = vjp(lambda x: run(x, t), x_t, has_aux=True)
        check_floats("output of log_prob_fn", log_prob, x_t.shape[:1])
        # A pullback of ones, not the gradient of a sum over the batch, which devices share.
        (score,) = pullback(jnp.ones_like(log_prob))
        predicted, rest = split_output("denoise_fn", output, x_t)
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

    return guided_fn
