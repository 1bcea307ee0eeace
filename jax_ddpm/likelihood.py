"""The variational bound on the likelihood, in bits per dimension.

    -log p(x_0) ≤ L_T + Σ_{t>0} L_{t-1} + L_0                        Ho et al. 2020, eq. 5

    L_T     = KL(q(x_T | x_0) ‖ N(0, I))                             the prior
    L_{t-1} = KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t))         entry t > 0
    L_0     = -log ∫ N(x; μ_θ(x_1, 1), Σ_θ) dx over the pixel's bin  entry 0, eq. 13

A pixel of 8 bits lies in [-1, 1], in a bin of width 2/255; the first and the last bin reach to
∓∞. The integral is a difference of two normal CDFs, with the approximation and the floor of
Ho et al.'s and OpenAI's code, on which all published figures rest:

    Φ(x) ≈ (1 + tanh u) / 2 = σ(2u),   u = √(2/π) (x + 0.044715 x³)

and no probability below 1e-12. Log-variances are OpenAI's: entry 0 takes entry 1.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jax_ddpm._errors import check_samples
from jax_ddpm._typing import Clipping, DenoiseFn, NoiseFn, PerSample, PRNGKey, Sample, Timestep
from jax_ddpm.forward import (
    predict_eps_from_xstart,
    q_mean_variance,
    q_posterior_mean_variance,
    q_sample,
)
from jax_ddpm.noise import noise_source
from jax_ddpm.reverse import PredictionType, VarianceType, in_float32, predict
from jax_ddpm.schedule import NoiseSchedule

_SLOPE, _CUBIC = math.sqrt(2 / math.pi), 0.044715


class BitsPerDim(NamedTuple):
    """The bound of each sample and its parts, in bits per dimension: `total = prior + Σ vb`.

    Attributes:
      total, prior: the bound and L_T, [batch].
      vb: the terms of the chain's entries, [batch, T], ascending: L_0, the decoder's, comes first.
      mse: the mean square of ε̂ - ε at each entry, [batch, T], whatever the network predicts.
    """

    total: PerSample
    prior: PerSample
    vb: Float[Array, "batch timesteps"]
    mse: Float[Array, "batch timesteps"]


@in_float32
def bits_per_dim(
    key: PRNGKey | None,
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = True,
    noise_fn: NoiseFn | None = None,
    first_sample: int | Array = 0,
) -> BitsPerDim:
    """The bound on -log₂ p(x_0) per dimension, Ho et al. 2020, eq. 5.

    It takes one draw of x_t per entry, so the network runs T times, in one `lax.scan`: beyond the
    results, memory does not grow with T.

    Args:
      key: typed key; may be None with `noise_fn`.
      schedule: the chain; the bound of a `respace`d one is its own, and looser.
      denoise_fn: `(x_t, t) -> output`.
      x_start: images of 8 bits, scaled to [-1, 1], [batch, …]; the result has their dtype.
      prediction_type, variance_type, clip_denoised: as in `p_mean_variance`.
      noise_fn: `i -> noise` in the shape of `x_start`, instead of the draws at entry i.
      first_sample: the number of the batch's first sample, which decides its randomness.

    Raises:
      ValueError: a shape or a choice does not fit, or there is neither `key` nor `noise_fn`.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> images, denoise_fn = jnp.zeros((2, 8, 8, 1)), lambda x_t, t: 0.1 * x_t
      >>> bound = ddpm.bits_per_dim(jax.random.key(0), chain, denoise_fn, images)
      >>> bound.total.shape, bound.vb.shape
      ((2,), (2, 10))
    """
    check_samples(schedule, x_start=x_start)
    x_start = jnp.asarray(x_start)
    draw = noise_source(key, noise_fn, x_start, first_sample)
    policy = (prediction_type, variance_type, clip_denoised)

    def step(_, i):
        noise = draw(i)
        x_t = q_sample(schedule, x_start, i, noise)
        bits, pred_xstart = vb_term(schedule, denoise_fn, x_start, x_t, i, policy)
        eps = predict_eps_from_xstart(schedule, x_t, i, pred_xstart)
        return None, (bits, mean_over_event((eps - noise) ** 2))

    # The gradient recomputes each entry, so that no activations are kept.
    step = jax.checkpoint(step, prevent_cse=False)
    _, (vb, mse) = lax.scan(step, None, jnp.arange(schedule.num_timesteps))
    mean, _, log_variance = q_mean_variance(schedule, x_start, schedule.num_timesteps - 1)
    prior = mean_over_event(gaussian_kl(mean, log_variance, 0.0, 0.0)) / math.log(2)
    return BitsPerDim(prior + jnp.sum(vb, axis=0), prior, vb.T, mse.T)


@in_float32
def vb_term(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    x_t: Sample,
    t: Timestep,
    policy: tuple[PredictionType, VarianceType, Clipping],
) -> tuple[Array, Array]:
    """Entry t of the bound, L_{t-1} of Ho et al. eq. 5 or L_0, in bits per dimension, and x̂_0."""
    p = predict(schedule, denoise_fn, *policy, x_t, t)
    mean, _, log_variance = q_posterior_mean_variance(schedule, x_start, x_t, t)
    kl = gaussian_kl(mean, log_variance, p.mean, p.log_variance)
    log_likelihood = discretized_gaussian_log_likelihood(x_start, p.mean, p.log_variance / 2)
    # Both are finite at every entry: a NaN in the unused one would reach the gradient.
    nats = jnp.where(jnp.equal(t, 0), -mean_over_event(log_likelihood), mean_over_event(kl))
    return nats / math.log(2), p.pred_xstart


def gaussian_kl(mean_1: Any, log_variance_1: Any, mean_2: Any, log_variance_2: Any) -> Array:
    """KL(N(mean_1, exp(log_variance_1)) ‖ N(mean_2, exp(log_variance_2))), elementwise, nats."""
    # expm1: of nearly equal variances, exp(…) - 1 would leave only rounding.
    log_ratio = log_variance_1 - log_variance_2
    distance = (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2)
    return (jnp.expm1(log_ratio) - log_ratio + distance) / 2


def discretized_gaussian_log_likelihood(x: Any, mean: Any, log_scale: Any) -> Array:
    """log P of the bin of pixel x under N(mean, exp(log_scale)²), Ho et al. eq. 13; elementwise.

    Works with logarithms of Φ = σ(2u) throughout. The difference of two CDFs, which in float32
    keeps few digits of a narrow bin and none of a far one, is a product:

        σ(a) - σ(b) = σ(a) σ(-b) (1 - exp(b - a))
    """
    inv_scale = jnp.exp(-log_scale)
    center, half_bin = (x - mean) * inv_scale, inv_scale / 255
    log_cdf_upper = jax.nn.log_sigmoid(_logit_cdf(center + half_bin))
    log_survival_lower = jax.nn.log_sigmoid(-_logit_cdf(center - half_bin))
    # a - b, with the cubes' difference multiplied out.
    a_minus_b = 2 * _logit_cdf(half_bin) + 12 * _CUBIC * _SLOPE * center**2 * half_bin
    log_bin = log_cdf_upper + log_survival_lower + jnp.log(-jnp.expm1(-a_minus_b))
    log_probability = jnp.where(
        x < -0.999, log_cdf_upper, jnp.where(x > 0.999, log_survival_lower, log_bin)
    )
    return jnp.maximum(log_probability, math.log(1e-12))


def mean_over_event(x: Array) -> Array:
    """The mean over all axes but the first: [batch]."""
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _logit_cdf(x: Array) -> Array:
    return 2 * _SLOPE * (x + _CUBIC * x**3)
