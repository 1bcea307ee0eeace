"""Training losses, one number for each sample of the batch: the caller takes the mean.

    L_simple = ‖ε - ε_θ(x_t, t)‖²                                   Ho et al. 2020, eq. 14
    L_vb     = L_{t-1} of the bound, L_0 at t = 0; see `likelihood`  eq. 5
    L_hybrid = L_simple + T/1000 · L_vb                             Nichol & Dhariwal 2021, eq. 16

with the mean taken over pixels and channels, and x_0 or v in place of ε by `prediction_type`.
In L_hybrid the bound's gradient stops at the mean, so that it trains the variance alone. Its
factor is OpenAI's (their `RESCALED_MSE`): the paper's λ = 0.001 times the T terms of the bound.

L_simple weighs the steps of the chain as ε does. Hang et al. 2023 clamp that weight, with
SNR = ᾱ_t / (1 - ᾱ_t), where the signal is strong:

    w = min(SNR, γ) / SNR,   min(SNR, γ),   min(SNR, γ) / (SNR + 1)     for ε, x_0, v
"""

from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jax_ddpm._errors import Field, FieldError, check_choice, check_positive
from jax_ddpm._typing import DenoiseFn, PerSample, Sample, Timestep
from jax_ddpm.forward import predict_v, q_sample
from jax_ddpm.likelihood import mean_over_event, vb_term
from jax_ddpm.reverse import PredictionType, VarianceType, check_prediction, denoise
from jax_ddpm.schedule import NoiseSchedule, extract

LossType = Literal["mse", "vb", "hybrid"]
Weighting = Literal["min_snr"]
_LEARNED = ("learned", "learned_range")


def check_loss(loss_type: Any, weighting: Any, variance_type: VarianceType) -> None:
    """Raises `FieldError` if these options do not fit together."""
    check_choice("variance_type", variance_type, VarianceType)
    check_choice("loss_type", loss_type, (None, *get_args(LossType)))
    check_choice("weighting", weighting, (None, *get_args(Weighting)))
    if loss_type == "vb" and weighting is not None:
        raise FieldError("weighting", "expected None with ", Field("loss_type", "vb"), ", got one")
    if loss_type == "hybrid" and variance_type not in _LEARNED:
        raise FieldError("loss_type", "'hybrid' comes with a learned ", Field("variance_type"))


def training_losses(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    t: Timestep,
    noise: Sample,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    loss_type: LossType | None = None,
    weighting: None | Weighting = None,
    min_snr_gamma: float = 5.0,
) -> PerSample:
    """The loss of each sample at x_t ~ q(x_t | x_0), [batch]; runs the network once.

    Args:
      schedule: the chain's tables.
      denoise_fn: `(x_t, t) -> output`.
      x_start: images in [-1, 1], [batch, …].
      t: entries of the chain, 0 … T - 1, [batch] or []; drawn uniformly in training.
      noise: standard normal, in the shape of `x_start`: it makes x_t and is the target for ε.
      prediction_type, variance_type: as in `p_mean_variance`.
      loss_type: `"mse"` (Ho et al. 2020, eq. 14); `"vb"`, the term of the variational bound in bits
        per dimension, with x̂_0 unclipped; or `"hybrid"`, both, for a learned variance (Nichol &
        Dhariwal 2021, eq. 16). Default: `"hybrid"` for a learned variance, which the mse would
        leave untrained, else `"mse"`.
      weighting: `"min_snr"` weighs the mse by Hang et al. 2023.
      min_snr_gamma: their γ.

    Raises:
      ValueError: a shape or a choice does not fit, or the choices do not fit together.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> images, t = jnp.zeros((2, 8, 8, 1)), jnp.array([0, 999])
      >>> noise = jax.random.normal(jax.random.key(0), images.shape)
      >>> perfect = ddpm.training_losses(schedule, lambda x_t, t: noise, images, t, noise)
      >>> perfect.tolist()
      [0.0, 0.0]
    """
    if loss_type is None:
        loss_type = "hybrid" if variance_type in _LEARNED else "mse"
    check_prediction(schedule, prediction_type)
    check_loss(loss_type, weighting, variance_type)
    check_positive(min_snr_gamma=min_snr_gamma)
    x_t = q_sample(schedule, x_start, t, noise)

    def bits(denoise_fn: DenoiseFn) -> Array:
        policy = (prediction_type, variance_type, False)
        return vb_term(schedule, denoise_fn, x_start, x_t, t, policy)[0]

    if loss_type == "vb":
        return bits(denoise_fn)
    output, values = denoise(schedule, denoise_fn, x_t, t, variance_type)
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = predict_v(schedule, x_start, t, noise)
    else:
        target = x_start
    squares = jnp.square(jnp.subtract(target, output))
    if weighting == "min_snr":
        signal = extract(schedule.sqrt_alphas_cumprod, t, output)
        snr = (signal / extract(schedule.sqrt_one_minus_alphas_cumprod, t, output)) ** 2
        weight = jnp.minimum(snr, min_snr_gamma)
        if prediction_type == "epsilon":  # min(SNR, γ) / SNR, and 1 where the SNR is 0
            weight = min_snr_gamma / jnp.maximum(snr, min_snr_gamma)
        elif prediction_type == "v_prediction":
            weight = weight / (snr + 1)
        squares = weight * squares
    mse = mean_over_event(squares)
    if loss_type == "mse":
        return mse
    frozen = jnp.concatenate([lax.stop_gradient(output), values], axis=-1)
    return mse + schedule.num_timesteps / 1000 * bits(lambda x_t, t: frozen)
