"""Pictures made from pictures: part of the chain from a noisy one, and DDIM there and back.

DDIM goes down by (Song et al. 2021a, eq. 12 with σ = 0)

    x_{i-1} = √ᾱ_{i-1} x̂_0 + √(1 - ᾱ_{i-1}) ε,    x̂_0 = (x_i - √(1 - ᾱ_i) ε) / √ᾱ_i

with ε = ε_θ(x_i, t_i). Going up is the same equation solved for x_i,

    x̂_0 = (x_{i-1} - √(1 - ᾱ_{i-1}) ε) / √ᾱ_{i-1},    x_i = √ᾱ_i x̂_0 + √(1 - ᾱ_i) ε

where x_i stands on both sides, and ε_θ(x_{i-1}, t_i) is put for ε: the timestep is that of where
the step goes, so the image itself, of which no network knows an ε, needs no rule of its own. The
error of a step is of second order, that of the way up and down of first.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jax_ddpm._errors import check_floats, check_schedule, check_whole
from jax_ddpm._typing import (
    DenoiseFn,
    NoiseFn,
    Numbers,
    Place,
    PRNGKey,
    Sample,
    ThresholdFn,
    Weight,
)
from jax_ddpm.forward import predict_eps_from_xstart, q_sample
from jax_ddpm.noise import noise_source, place
from jax_ddpm.reverse import PredictionType, VarianceType, in_float32, p_mean_variance
from jax_ddpm.samplers import Sampler, ddim
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.schedule import NoiseSchedule, extract, per_sample


@in_float32
def image_to_image(
    key: PRNGKey | None,
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    steps: int,
    *,
    sampler: Sampler | None = None,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: bool | ThresholdFn = True,
    noise_fn: NoiseFn | None = None,
    first_sample: int | Array = 0,
    sharding: Place | None = None,
) -> Array:
    """SDEdit (Meng et al. 2022): noise `x_start` up to entry `steps` - 1, and run the chain down.

    The first entries of a chain are a chain of their own, and this is `p_sample_loop` on it with
    x_T from q(x_T | x_start): the arguments are those there, and the start's noise is that of
    `i = steps`. Few steps keep the picture, all T forget it. Raises `ValueError` for `steps`
    outside 1 … T, and as `p_sample_loop` does.
    """
    check_schedule(schedule)
    check_whole("steps", steps, 1, schedule.num_timesteps)
    chain = jax.tree.map(lambda table: table[:steps], schedule)
    x_start = place(jnp.asarray(x_start), sharding)
    draw = noise_source(key, noise_fn, x_start, first_sample, sharding)
    x_T = q_sample(chain, x_start, steps - 1, draw(jnp.int32(steps)))
    images = p_sample_loop(
        key,
        chain,
        denoise_fn,
        x_T.shape,
        sampler=sampler,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_denoised=clip_denoised,
        x_T=x_T,
        noise_fn=noise_fn,
        first_sample=first_sample,
        sharding=sharding,
    )
    return jnp.asarray(images)


@in_float32
def ddim_invert(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: bool | ThresholdFn = False,
    sharding: Place | None = None,
) -> Array:
    """The x_T from which `ddim()` comes back to `x_start` (Dhariwal & Nichol 2021, App. F).

    One scan from entry 0 to T - 1. On a schedule that ends in noise, `x_start` is taken to have
    that noise. Arguments and errors are those of `p_mean_variance`.
    """
    check_schedule(schedule)
    predict = partial(
        p_mean_variance,
        schedule,
        denoise_fn,
        prediction_type=prediction_type,
        variance_type=variance_type,
        clip_denoised=clip_denoised,
    )

    def step(x_prev, i):
        eps = predict_eps_from_xstart(schedule, x_prev, i, predict(x_prev, i).pred_xstart)
        alpha_bar_prev = extract(schedule.alphas_cumprod_prev, i, x_prev)
        x_start = (x_prev - jnp.sqrt(1 - alpha_bar_prev) * eps) / jnp.sqrt(alpha_bar_prev)
        return place(q_sample(schedule, x_start, i, eps), sharding), None

    entries = jnp.arange(schedule.num_timesteps, dtype=jnp.int32)
    x_start = place(jnp.asarray(x_start), sharding)
    return lax.scan(jax.checkpoint(step, prevent_cse=False), x_start, entries)[0]


@in_float32
def slerp(a: Sample, b: Sample, weight: Weight) -> Array:
    """From `a` (`weight` 0) to `b` (1) along the sphere (Shoemake 1985), each sample by itself.

    A straight line would pass where there is less noise than either has. It is what remains,
    though, for two samples on one line through 0.
    """
    a, b = jnp.asarray(a), jnp.asarray(b)
    check_floats("b", b, a.shape)
    event = tuple(range(1, a.ndim))
    weight = per_sample("weight", weight, a)
    norms = jnp.sqrt((a * a).sum(event, keepdims=True) * (b * b).sum(event, keepdims=True))
    cosine = (a * b).sum(event, keepdims=True) / norms
    # Written so that a NaN, of a sample that is 0, counts as parallel.
    apart = jnp.abs(cosine) < 1 - 4 * jnp.finfo(a.dtype).eps
    angle = jnp.arccos(jnp.where(apart, cosine, 0))
    on_sphere = jnp.sin((1 - weight) * angle) * a + jnp.sin(weight * angle) * b
    return jnp.where(apart, on_sphere / jnp.sin(angle), (1 - weight) * a + weight * b)


@in_float32
def interpolate(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_a: Sample,
    x_b: Sample,
    weights: Numbers,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: bool | ThresholdFn = True,
    sharding: Place | None = None,
) -> Array:
    """Pictures between `x_a` and `x_b`, [weights, batch, …]: `slerp` between their x_T.

    Song et al. 2021a, App. D.5, with x_T from `ddim_invert`, so that weights 0 and 1 give `x_a`
    and `x_b` back up to DDIM's error, which halves as the steps double: of an exact network, 0.08
    of a pixel at most with 20 steps, 0.009 with 200. Arguments and errors are those of
    `p_mean_variance`.
    """
    check_floats("x_b", x_b, jnp.shape(x_a))
    policy: dict[str, Any] = {
        "prediction_type": prediction_type,
        "variance_type": variance_type,
        "clip_denoised": clip_denoised,
        "sharding": sharding,
    }
    a, b = (ddim_invert(schedule, denoise_fn, x, **policy) for x in (x_a, x_b))

    def decode(weight):
        start = {"sampler": ddim(), "x_T": slerp(a, b, weight)}
        return p_sample_loop(None, schedule, denoise_fn, a.shape, **start, **policy)

    # One weight at a time keeps each batch where `sharding` wants it, and the memory of one.
    return lax.map(decode, jnp.asarray(weights, a.dtype))
