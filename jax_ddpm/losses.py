"""Training losses, one number for each sample of the batch: the caller takes the mean.

    L_simple = ‖ε - ε_θ(x_t, t)‖²                                   Ho et al. 2020, eq. 14

with the mean taken over pixels and channels, and x_0 or v in place of ε by `prediction_type`.
"""

from typing import Literal

import jax.numpy as jnp

from jax_ddpm._checks import check_choice, check_shape
from jax_ddpm._typing import DenoiseFn, PerSample, Sample, Timestep
from jax_ddpm.forward import predict_v, q_sample
from jax_ddpm.reverse import PredictionType, VarianceType, denoise
from jax_ddpm.schedule import NoiseSchedule

__all__ = ["LossType", "training_losses"]

LossType = Literal["mse"]


def training_losses(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    t: Timestep,
    noise: Sample,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    loss_type: LossType = "mse",
) -> PerSample:
    """The loss of each sample at x_t ~ q(x_t | x_0), Ho et al. eq. 14; shape [batch].

    `noise` is the standard normal draw that makes x_t, and the target where ε is predicted.
    """
    check_choice("loss_type", loss_type, ("mse",))
    check_choice("prediction_type", prediction_type, ("epsilon", "sample", "v_prediction"))
    check_shape("noise", noise, jnp.shape(x_start))
    x_t = q_sample(schedule, x_start, t, noise)
    output, _ = denoise(schedule, denoise_fn, x_t, t, variance_type=variance_type)
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "v_prediction":
        target = predict_v(schedule, x_start, t, noise)
    else:
        target = x_start
    return jnp.mean((target - output) ** 2, axis=tuple(range(1, output.ndim)))
