"""Pictures made from pictures: part of the chain, DDIM there and back, and inpainting.

DDIM goes down by (Song et al. 2021a, eq. 12 with σ = 0)

    x_{i-1} = √ᾱ_{i-1} x̂_0 + √(1 - ᾱ_{i-1}) ε,    x̂_0 = (x_i - √(1 - ᾱ_i) ε) / √ᾱ_i

with ε = ε_θ(x_i, t_i). Going up is the same equation solved for x_i,

    x̂_0 = (x_{i-1} - √(1 - ᾱ_{i-1}) ε) / √ᾱ_{i-1},    x_i = √ᾱ_i x̂_0 + √(1 - ᾱ_i) ε

where x_i stands on both sides, so ε_θ(x_{i-1}, t_i) replaces ε: the network sees x_{i-1} with the
timestep at which the step ends. So the first step, from the clean image, needs no exception, though
no network has learned ε without noise. Each step has an error of second order; the way up and down
has one of first order.

RePaint (Lugmayr et al. 2022) walks the chain with detours: from some levels it goes `jump_length`
entries back up and down again, `resamples` - 1 times, so that the known and the drawn part come to
agree. The levels of its walk for T = 5, jump_length = 2, resamples = 2:

    x_T=4   3 2   4 3 2   1 0   2 1 0   x_0        levels 2 and 0 are jumped from
            └ ┘   └───┘   └ ┘   └───┘

    down    x_{i-1} = m q(x_{i-1} | x_start) + (1 - m) p_θ(x_{i-1} | x_i)            eq. 8
    up      x_i = √(1 - β_i) x_{i-1} + √β_i ε                                        eq. 1

The walk is planned on the host and followed by one `lax.scan`, so the program does not grow.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Real

from jax_ddpm._errors import FieldError, check_between, check_floats, check_samples, check_whole
from jax_ddpm._typing import AnyArray, Clipping, DenoiseFn, NoiseFn, Place, PRNGKey, Sample, Weight
from jax_ddpm.forward import predict_eps_from_xstart, q_sample
from jax_ddpm.noise import noise_source, place
from jax_ddpm.reverse import PredictionType, VarianceType, in_float32, predict
from jax_ddpm.samplers import Sampler, ancestral, ddim
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.schedule import NoiseSchedule, extract, per_sample, warn_of_signal


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
    clip_denoised: Clipping = True,
    noise_fn: NoiseFn | None = None,
    first_sample: int | Array = 0,
    sharding: Place = None,
) -> Array:
    """SDEdit (Meng et al. 2022): noise `x_start` up to entry `steps` - 1, and run the chain down.

    Args:
      key, schedule, denoise_fn, sampler: as in `p_sample_loop`.
      x_start: images in [-1, 1], [batch, …].
      steps: number of steps, from 1, which keeps the picture, to T, which forgets it. x_T takes the
        noise of entry `i = steps`.
      prediction_type, variance_type, clip_denoised: as in `p_sample_loop`.
      noise_fn, first_sample, sharding: as in `p_sample_loop`.

    Raises:
      ValueError: `steps` lies outside 1 … T, or as in `p_sample_loop`.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> images, denoise_fn = jnp.zeros((2, 8, 8, 1)), lambda x_t, t: 0.1 * x_t
      >>> ddpm.image_to_image(jax.random.key(0), chain, denoise_fn, images, 4).shape
      (2, 8, 8, 1)
    """
    check_samples(schedule, x_start=x_start)
    check_whole("steps", steps, 1, schedule.num_timesteps)
    chain = jax.tree.map(lambda table: table[:steps], schedule)
    x_start = place(jnp.asarray(x_start), sharding)
    draw = noise_source(key, noise_fn, x_start, first_sample, sharding)
    x_T = q_sample(chain, x_start, steps - 1, draw(jnp.int32(steps)))
    options: Any = {"prediction_type": prediction_type, "variance_type": variance_type}
    options |= {"clip_denoised": clip_denoised, "sampler": sampler, "sharding": sharding}
    options |= {"x_T": x_T, "noise_fn": noise_fn, "first_sample": first_sample}
    return jnp.asarray(p_sample_loop(key, chain, denoise_fn, x_T.shape, **options))


@in_float32
def ddim_invert(
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = False,
    sharding: Place = None,
) -> Array:
    """The x_T from which `ddim()` returns to `x_start` (Dhariwal & Nichol 2021, App. F).

    Args:
      schedule: the chain. If it leaves noise (`final_alpha_cumprod` below 1), `x_start` should too.
      denoise_fn: the network, which runs T times.
      x_start: images in [-1, 1], [batch, …].
      prediction_type, variance_type, clip_denoised, sharding: as in `p_sample_loop`.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> x_start, zeros = jnp.ones((1, 8, 8, 1)), lambda x_t, t: 0 * x_t
      >>> x_T = ddpm.ddim_invert(chain, zeros, x_start)
      >>> bool(jnp.allclose(x_T, chain.sqrt_alphas_cumprod[-1] * x_start))
      True
    """
    check_samples(schedule, x_start=x_start)
    policy = (prediction_type, variance_type, clip_denoised)

    def step(x_prev, i):
        x_start = predict(schedule, denoise_fn, *policy, x_prev, i).pred_xstart
        eps = predict_eps_from_xstart(schedule, x_prev, i, x_start)
        alpha_bar_prev = extract(schedule.alphas_cumprod_prev, i, x_prev)
        x_start = (x_prev - jnp.sqrt(1 - alpha_bar_prev) * eps) / jnp.sqrt(alpha_bar_prev)
        return place(q_sample(schedule, x_start, i, eps), sharding), None

    entries = jnp.arange(schedule.num_timesteps, dtype=jnp.int32)
    x_start = place(jnp.asarray(x_start), sharding)
    return lax.scan(jax.checkpoint(step, prevent_cse=False), x_start, entries)[0]


@in_float32
def slerp(a: Sample, b: Sample, weight: Weight) -> Array:
    """Interpolate from `a` to `b` along the sphere (Shoemake 1985), sample by sample.

    A straight line would pass through points with less noise than either end. Two samples on one
    line through 0 have no such arc, and are joined by the line.

    Args:
      a, b: samples, [batch, …], of one shape.
      weight: 0 for `a` to 1 for `b`, one number or [batch].

    Examples:
      >>> halfway = ddpm.slerp(jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 1.0]]), 0.5)
      >>> print(halfway.round(3))
      [[0.707 0.707]]
    """
    check_floats("a", a, jnp.shape(a))
    check_floats("b", b, jnp.shape(a))
    a, b = jnp.asarray(a), jnp.asarray(b)
    event = tuple(range(1, a.ndim))
    weight = per_sample("weight", weight, a)
    norms = jnp.sqrt((a * a).sum(event, keepdims=True) * (b * b).sum(event, keepdims=True))
    cosine = (a * b).sum(event, keepdims=True) / norms
    # A sample of zeros gives NaN, which this comparison counts as parallel.
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
    weights: Sequence[float] | Real[Array | np.ndarray, "weights"],
    *,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = True,
    sharding: Place = None,
) -> Array:
    """Images between `x_a` and `x_b`, [weights, batch, …], by `slerp` between their x_T.

    As in Song et al. 2021a, App. D.5. x_T comes from `ddim_invert`, so weights 0 and 1 return `x_a`
    and `x_b` up to DDIM's error, which halves as the steps double: with an exact network, at most
    0.08 of a pixel in 20 steps, 0.009 in 200.

    Args:
      schedule, denoise_fn: the chain and the network.
      x_a, x_b: images in [-1, 1], [batch, …], of one shape.
      weights: numbers from 0 to 1, [weights].
      prediction_type, variance_type, clip_denoised, sharding: as in `p_sample_loop`.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> x, denoise_fn = jnp.full((2, 8, 8, 1), 0.5), lambda x_t, t: 0.1 * x_t
      >>> ddpm.interpolate(chain, denoise_fn, x, -x, [0, 0.5, 1]).shape
      (3, 2, 8, 8, 1)
    """
    check_floats("x_b", x_b, jnp.shape(x_a))
    policy: Any = {"prediction_type": prediction_type, "variance_type": variance_type}
    policy |= {"clip_denoised": clip_denoised, "sharding": sharding}
    a, b = (ddim_invert(schedule, denoise_fn, x, **policy) for x in (x_a, x_b))

    def decode(weight):
        start = {"sampler": ddim(), "x_T": slerp(a, b, weight)}
        return p_sample_loop(None, schedule, denoise_fn, a.shape, **start, **policy)

    # One weight at a time keeps the sharding of each batch, and the memory of one.
    return lax.map(decode, jnp.atleast_1d(jnp.asarray(weights, a.dtype)))


def repaint_walk(
    timesteps: int, jump_length: int = 10, resamples: int = 10
) -> tuple[Int[np.ndarray, "visits"], Bool[np.ndarray, "visits"]]:
    """The entry of each of RePaint's steps, and whether it leads up (Lugmayr et al. 2022, App. B).

    A step of entry i leads down from level i to i - 1, or up from i - 1 to i. Jumps start from the
    levels 0, `jump_length`, 2 `jump_length`, … unless they would leave the chain.
    """
    check_whole("resamples", resamples, 1)
    check_whole("jump_length", jump_length, 1, timesteps - 1 if resamples > 1 else np.inf)
    visits = []
    for entry in reversed(range(timesteps)):
        visits.append((entry, False))
        level, climb = entry - 1, range(entry, entry + int(jump_length))
        if level >= 0 and level % jump_length == 0 and climb[-1] < timesteps:
            detour = [(i, True) for i in climb] + [(i, False) for i in reversed(climb)]
            visits += detour * (resamples - 1)
    entries, up = zip(*visits, strict=True)
    return np.array(entries), np.array(up)


@in_float32
def inpaint(
    key: PRNGKey | None,
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    x_start: Sample,
    mask: AnyArray,
    *,
    jump_length: int = 10,
    resamples: int = 10,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = True,
    noise_fn: NoiseFn | None = None,
    first_sample: int | Array = 0,
    sharding: Place = None,
) -> Array:
    """RePaint, Lugmayr et al. 2022 Algorithm 1: `x_start` where `mask` is 1, samples where it is 0.

    It walks down the chain with detours. The N visits of the walk are numbered downwards to 0.
    Visit n takes the draw of entry n in `p_sample_loop`, and the start takes draw N. So with
    `resamples=1` the missing part gets the noise that `p_sample_loop` would give it.

    Args:
      key: typed key; may be None with `noise_fn`.
      schedule, denoise_fn: the chain and the network.
      x_start: [batch, …]; its values where `mask` is 0 are ignored, but must be finite.
      mask: broadcastable to `x_start` (`mask[..., None]` has a channel), booleans or numbers in
        [0, 1]. A value between 0 and 1 is the known pixel's share in a mean of both, at every step.
      jump_length, resamples: from every `jump_length`-th entry the walk climbs back `jump_length`
        entries and descends again, `resamples` - 1 times; `resamples=1` never jumps.
      prediction_type, variance_type, clip_denoised, first_sample, sharding: as in `p_sample_loop`.
      noise_fn: `n -> noise` of the shape of `x_start`, for visit n and for N.

    Returns:
      x_0, equal to `x_start` to the bit where `mask` is 1.

    Raises:
      ValueError: a concrete `mask` lies outside [0, 1], a jump leaves the chain,
        `jump_length` or `resamples` is below 1, or as in `p_sample_loop`.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> images, denoise_fn = jnp.ones((2, 8, 8, 1)), lambda x_t, t: 0.1 * x_t
      >>> left = jnp.arange(8)[:, None] < 4  # [width, channel]: the left half is known
      >>> filled = ddpm.inpaint(jax.random.key(0), chain, denoise_fn, images, left, jump_length=2)
      >>> bool((filled == images)[:, :, :4].all())
      True
    """
    check_samples(schedule, x_start=x_start)
    entries, up = repaint_walk(schedule.num_timesteps, jump_length, resamples)
    x_start = place(jnp.asarray(x_start), sharding)
    check_between("mask", mask, 0, 1)  # image files have 0 and 255
    mask = jnp.clip(jnp.asarray(mask, x_start.dtype), 0, 1)  # a traced one cannot be checked
    try:
        mask = place(jnp.broadcast_to(mask, x_start.shape), sharding)
    except ValueError as error:
        raise FieldError("mask", str(error)) from None
    draw = noise_source(key, noise_fn, x_start, first_sample, sharding)
    policy = (prediction_type, variance_type, clip_denoised)
    sampler, run_network = ancestral(), partial(predict, schedule, denoise_fn, *policy)

    # One draw serves both parts: each pixel is either known or drawn.
    def descend(x_t, i, noise):
        drawn, _ = sampler.step(schedule, run_network, lambda i: noise, i, x_t, ())
        known = q_sample(schedule, x_start, jnp.maximum(i - 1, 0), noise)
        known = jnp.where(i > 0, known, x_start)
        return mask * known + (1 - mask) * drawn

    def ascend(x_prev, i, noise):
        beta = extract(schedule.betas, i, x_prev)
        return jnp.sqrt(1 - beta) * x_prev + jnp.sqrt(beta) * noise

    def step(x_t, visit):
        number, i, upwards = visit
        x_t = lax.cond(upwards, ascend, descend, x_t, i, draw(number))
        return place(x_t, sharding), None

    numbers = np.arange(entries.size)[::-1]
    visits = (jnp.asarray(numbers, jnp.int32), jnp.asarray(entries, jnp.int32), jnp.asarray(up))
    warn_of_signal(schedule)
    x_T = place(draw(jnp.int32(entries.size)), sharding)
    return lax.scan(jax.checkpoint(step, prevent_cse=False), x_T, visits)[0]
