"""The forward process q, its posterior, and conversions between ε, x_0 and v.

    q(x_t | x_0) = N(√ᾱ_t x_0, (1 - ᾱ_t) I)                          Ho et al. 2020, eq. 4
    q(x_{t-1} | x_t, x_0) = N(μ̃_t(x_t, x_0), β̃_t I)                 eq. 6, 7
    x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) ε                                    reparametrised eq. 4
    v = √ᾱ_t ε - √(1 - ᾱ_t) x_0                                      Salimans & Ho 2022, App. D

All raise `ValueError` when a shape does not fit or a concrete t lies outside the chain.
"""

import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm._errors import check_samples
from jax_ddpm._typing import Sample, Timestep
from jax_ddpm.schedule import NoiseSchedule, extract


def q_sample(schedule: NoiseSchedule, x_start: Sample, t: Timestep, noise: Sample) -> Array:
    """Sample from q(x_t | x_0), Ho et al. 2020, eq. 4: x_t = √ᾱ_t x_0 + √(1 - ᾱ_t) noise.

    Args:
      schedule: the chain's tables.
      x_start: images in [-1, 1], [batch, …]; x_t has their shape and dtype.
      t: entries of the chain, 0 … T - 1, [batch] or [] for all. Entry 0 has one step of noise.
      noise: standard normal, in the shape of `x_start`.

    Raises:
      ValueError: a shape does not fit, or a concrete `t` lies outside the chain.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> images, noise = jnp.ones((2, 8, 8, 1)), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
      >>> ddpm.q_sample(schedule, images, jnp.array([0, 999]), noise).shape
      (2, 8, 8, 1)
    """
    signal, sigma = _rates(schedule, t, x_start=x_start, noise=noise)
    return signal * x_start + sigma * noise


def q_mean_variance(
    schedule: NoiseSchedule, x_start: Sample, t: Timestep
) -> tuple[Array, Array, Array]:
    """Mean, variance and log-variance of q(x_t | x_0), Ho et al. 2020, eq. 4, shaped as `x_start`.

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_start: images in [-1, 1], [batch, …].

    Examples:
      >>> schedule = ddpm.make_schedule([0.5, 0.5])
      >>> mean, variance, log_variance = ddpm.q_mean_variance(schedule, jnp.ones((1, 1, 1, 1)), 1)
      >>> mean.item(), variance.item()  # √0.25 and 1 - 0.25
      (0.5, 0.75)
    """
    check_samples(schedule, x_start=x_start)
    mean = extract(schedule.sqrt_alphas_cumprod, t, x_start) * x_start
    variance = extract(schedule.sqrt_one_minus_alphas_cumprod**2, t, x_start)
    log_variance = extract(schedule.log_one_minus_alphas_cumprod, t, x_start)
    return mean, jnp.broadcast_to(variance, mean.shape), jnp.broadcast_to(log_variance, mean.shape)


def q_posterior_mean_variance(
    schedule: NoiseSchedule, x_start: Sample, x_t: Sample, t: Timestep
) -> tuple[Array, Array, Array]:
    """Mean, variance and log-variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020, eq. 6 and 7.

    All have the shape of `x_t`. At t = 0 the variance is 0 and the log-variance is that of entry
    1, as in OpenAI's code.

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_start, x_t: the image and the state, [batch, …], of one shape.

    Examples:
      >>> schedule, x_t = ddpm.make_schedule([0.5, 0.5]), jnp.ones((1, 1, 1, 1))
      >>> mean, variance, _ = ddpm.q_posterior_mean_variance(schedule, x_t / 4, x_t, 0)
      >>> mean.item(), variance.item()  # the image itself
      (0.25, 0.0)
    """
    check_samples(schedule, x_t=x_t, x_start=x_start)
    of_start = extract(schedule.posterior_mean_coef1, t, x_t)
    mean = of_start * x_start + extract(schedule.posterior_mean_coef2, t, x_t) * x_t
    variance = extract(schedule.posterior_variance, t, x_t)
    log_variance = extract(schedule.posterior_log_variance_clipped, t, x_t)
    return mean, jnp.broadcast_to(variance, mean.shape), jnp.broadcast_to(log_variance, mean.shape)


def predict_xstart_from_eps(
    schedule: NoiseSchedule, x_t: Sample, t: Timestep, eps: Sample
) -> Array:
    """x_0 = (x_t - √(1 - ᾱ_t) ε) / √ᾱ_t, in the shape of `x_t`; not finite where ᾱ_t = 0.

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_t, eps: the state and its noise, [batch, …], of one shape.

    Examples:
      >>> schedule, x_t = ddpm.make_schedule([0.75]), jnp.ones((1, 1, 1, 1))
      >>> ddpm.predict_xstart_from_eps(schedule, x_t, 0, 0 * x_t).item()  # 1 / √0.25
      2.0
    """
    check_samples(schedule, x_t=x_t, eps=eps)
    scaled = extract(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return scaled - extract(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * eps


def predict_eps_from_xstart(
    schedule: NoiseSchedule, x_t: Sample, t: Timestep, x_start: Sample
) -> Array:
    """ε = (x_t - √ᾱ_t x_0) / √(1 - ᾱ_t), in the shape of `x_t`; finite also where ᾱ_t = 0.

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_t, x_start: the state and its image, [batch, …], of one shape.

    Examples:
      >>> schedule, x_t = ddpm.make_schedule([0.75]), jnp.ones((1, 1, 1, 1))
      >>> x_start = ddpm.predict_xstart_from_eps(schedule, x_t, 0, 0.3 * x_t)
      >>> round(ddpm.predict_eps_from_xstart(schedule, x_t, 0, x_start).item(), 5)
      0.3
    """
    signal, sigma = _rates(schedule, t, x_t=x_t, x_start=x_start)
    return jnp.subtract(x_t, signal * x_start) / sigma


def predict_v(schedule: NoiseSchedule, x_start: Sample, t: Timestep, noise: Sample) -> Array:
    """v = √ᾱ_t ε - √(1 - ᾱ_t) x_0, the target of v-prediction (Salimans & Ho 2022, Appendix D).

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_start, noise: the image and its noise, [batch, …], of one shape, which is also that of v.

    Examples:
      >>> schedule, x = ddpm.make_schedule([0.75]), jnp.ones((1, 1, 1, 1))
      >>> round(ddpm.predict_v(schedule, x, 0, noise=0 * x).item(), 5)  # -√0.75
      -0.86603
    """
    signal, sigma = _rates(schedule, t, x_start=x_start, noise=noise)
    return signal * noise - sigma * x_start


def predict_xstart_from_v(schedule: NoiseSchedule, x_t: Sample, t: Timestep, v: Sample) -> Array:
    """x_0 = √ᾱ_t x_t - √(1 - ᾱ_t) v, in the shape of `x_t`.

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_t, v: the state and its velocity, [batch, …], of one shape.

    Examples:
      >>> schedule, x = ddpm.make_schedule([0.75]), jnp.ones((1, 1, 1, 1))
      >>> x_t, v = ddpm.q_sample(schedule, 0.3 * x, 0, x), ddpm.predict_v(schedule, 0.3 * x, 0, x)
      >>> round(ddpm.predict_xstart_from_v(schedule, x_t, 0, v).item(), 5)
      0.3
    """
    signal, sigma = _rates(schedule, t, x_t=x_t, v=v)
    return signal * x_t - sigma * v


def predict_eps_from_v(schedule: NoiseSchedule, x_t: Sample, t: Timestep, v: Sample) -> Array:
    """ε = √ᾱ_t v + √(1 - ᾱ_t) x_t, in the shape of `x_t`.

    Args:
      schedule, t: the chain and its entries, [batch] or [].
      x_t, v: the state and its velocity, [batch, …], of one shape.

    Examples:
      >>> schedule, x = ddpm.make_schedule([0.75]), jnp.ones((1, 1, 1, 1))
      >>> x_t, v = ddpm.q_sample(schedule, x, 0, 0.3 * x), ddpm.predict_v(schedule, x, 0, 0.3 * x)
      >>> round(ddpm.predict_eps_from_v(schedule, x_t, 0, v).item(), 5)
      0.3
    """
    signal, sigma = _rates(schedule, t, x_t=x_t, v=v)
    return signal * v + sigma * x_t


def _rates(schedule: NoiseSchedule, t: Timestep, **samples: Sample) -> tuple[Array, Array]:
    """√ᾱ_t and √(1 - ᾱ_t) for samples of one shape."""
    check_samples(schedule, **samples)
    x = next(iter(samples.values()))
    signal = extract(schedule.sqrt_alphas_cumprod, t, x)
    return signal, extract(schedule.sqrt_one_minus_alphas_cumprod, t, x)
