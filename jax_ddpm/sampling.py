"""The reverse chain as one `lax.scan`, whatever the update rule.

        x_T ──▶ entry T-1 ──▶ … ──▶ entry i ──▶ … ──▶ entry 0 ──▶ x_0
                                    │
                 predict: denoise_fn, then p_mean_variance
                 update:  sampler.step, with the noise of (sample, entry)

The loop holds one state and nothing of the trajectory, and its program does not grow with T.
Randomness belongs to the sample (see `noise`); x_T uses `i = T`. The loop is differentiable. Its
gradient recomputes each step from its x_t, so memory holds T states, not T times the network's
activations.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Int

from jax_ddpm._errors import check_floats, check_kind, check_schedule, check_whole
from jax_ddpm._typing import Clipping, DenoiseFn, NoiseFn, Place, PRNGKey, Sample, Shape
from jax_ddpm.noise import noise_source, place, sample_noise
from jax_ddpm.reverse import PredictionType, VarianceType, in_float32, predict
from jax_ddpm.samplers import Sampler, ancestral
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal


class SampleState(NamedTuple):
    """What the next step of the chain needs: from `p_sample_init`, for `p_sample_steps`.

    Attributes:
      i: the entry of the next step, int32 []: T - 1 … 0, and -1 after the last.
      x_t: the state, [batch, …]; x_0 after the last step.
      memory: the sampler's own.
    """

    i: Int[Array, ""]
    x_t: Array
    memory: Any


@in_float32
def p_sample_loop(
    key: PRNGKey | None,
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    shape: Shape,
    *,
    sampler: Sampler | None = None,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = True,
    x_T: Sample | None = None,
    noise_fn: NoiseFn | None = None,
    first_sample: int | Array = 0,
    save_every: int | None = None,
    sharding: Place = None,
) -> Array | tuple[Array, Array]:
    """Run the whole reverse chain, Ho et al. 2020 Algorithm 2 for the default `ancestral()`.

    Args:
      key: typed key; may be None with `x_T` if the rest needs no draws.
      schedule: the chain; a `respace`d one runs fewer steps.
      denoise_fn: `(x_t, t) -> output`, with t the training timestep, int32 [batch].
      shape: [batch, height, width, channel] of the result.
      sampler: the update rule. Default: `ancestral()`.
      prediction_type, variance_type, clip_denoised: as in `p_mean_variance`.
      x_T: the start, instead of a draw. The network's input and the result have its dtype.
      noise_fn: `i -> noise` of `shape`, instead of the draws at entry i.
      first_sample: the number of the batch's first sample, which decides its randomness.
      save_every: also return the state after every `save_every` steps.
      sharding: of the noise and the state. Without it XLA replicates the loop over the devices of
        a mesh.

    Returns:
      x_0 of `shape`; with `save_every`, `(x_0, states)` with states [T // save_every, *shape],
        noisiest first.

    Raises:
      ValueError: a shape, a choice or `save_every` does not fit, or noise is needed and there is
        neither `key` nor `noise_fn`.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(1000))
      >>> chain = ddpm.respace(schedule, ddpm.spaced_timesteps(1000, 10, "trailing"))
      >>> denoise_fn = lambda x_t, t: 0.1 * x_t  # your network
      >>> draw = lambda key: ddpm.p_sample_loop(key, chain, denoise_fn, (4, 8, 8, 1))
      >>> jax.jit(draw)(jax.random.key(0)).shape
      (4, 8, 8, 1)
    """
    batch: Any = {"sampler": sampler, "first_sample": first_sample, "sharding": sharding}
    policy: Any = {"prediction_type": prediction_type, "variance_type": variance_type}
    policy |= {"clip_denoised": clip_denoised, "noise_fn": noise_fn}
    state = p_sample_init(key, schedule, shape, x_T=x_T, **batch)
    run = partial(p_sample_steps, key, schedule, denoise_fn, **batch, **policy)
    total = schedule.num_timesteps
    if save_every is None:
        return run(state, total).x_t
    check_whole("save_every", save_every, 1, total)

    def step(state, _):
        state = run(state, save_every)
        return state, state.x_t

    state, states = lax.scan(step, state, length=total // save_every)
    return run(state, total % save_every).x_t, states


def p_sample_init(
    key: PRNGKey | None,
    schedule: NoiseSchedule,
    shape: Shape,
    *,
    sampler: Sampler | None = None,
    x_T: Sample | None = None,
    first_sample: int | Array = 0,
    sharding: Place = None,
) -> SampleState:
    """The state before the first step: x_T, drawn from N(0, I) unless given.

    Warns if it is drawn where √ᾱ_T is above 0.05: in training x_T then shows the image, so samples
    get a wrong brightness.

    Args:
      key, schedule, shape, x_T, first_sample, sharding: as in `p_sample_loop`.
      sampler: the update rule, the same as in `p_sample_steps`. Default: `ancestral()`.

    Raises:
      ValueError: `x_T` is not a floating array of `shape`, or there is neither `key` nor `x_T`.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.cosine_beta_schedule(20))
      >>> state = ddpm.p_sample_init(jax.random.key(0), chain, (2, 8, 8, 1))
      >>> int(state.i), state.x_t.shape
      (19, (2, 8, 8, 1))
    """
    check_schedule(schedule)
    total = schedule.num_timesteps
    if x_T is None:
        warn_of_signal(schedule)
        x_T = sample_noise(key, total, shape, first_sample=first_sample, sharding=sharding)
    check_floats("x_T", x_T, shape)
    x_T = place(jnp.asarray(x_T), sharding)
    return SampleState(jnp.int32(total - 1), x_T, _rule(sampler).init(x_T))


@in_float32
def p_sample_steps(
    key: PRNGKey | None,
    schedule: NoiseSchedule,
    denoise_fn: DenoiseFn,
    state: SampleState,
    steps: int,
    *,
    sampler: Sampler | None = None,
    prediction_type: PredictionType = "epsilon",
    variance_type: VarianceType = "fixed_small",
    clip_denoised: Clipping = True,
    noise_fn: NoiseFn | None = None,
    first_sample: int | Array = 0,
    sharding: Place = None,
) -> SampleState:
    """Take `steps` steps down the chain: `p_sample_loop` in pieces, for example for a progress bar.

    T steps from `p_sample_init` are the whole chain. Pieces change no random bits, and change the
    result only by rounding (1e-15 of a pixel in float64, 1e-6 in float32), since the compiler may
    fuse each piece differently. A state of sixteen bits is rounded at the end of a piece.

    Args:
      key, schedule, denoise_fn: as in `p_sample_loop`, and the same for every piece.
      state: from `p_sample_init` or the piece before.
      steps: number of steps, a Python integer, at most those that are left.
      sampler, prediction_type, variance_type, clip_denoised: likewise as in `p_sample_loop`.
      noise_fn, first_sample, sharding: likewise.

    Returns:
      The state `steps` entries further down; after the last, its `x_t` is x_0.

    Raises:
      ValueError: `steps` is larger than what a concrete `state` has left, or as in `p_sample_loop`.

    Examples:
      >>> key, chain = jax.random.key(0), ddpm.make_schedule(ddpm.cosine_beta_schedule(20))
      >>> denoise_fn = lambda x_t, t: 0.1 * x_t  # your network
      >>> run = jax.jit(lambda state: ddpm.p_sample_steps(key, chain, denoise_fn, state, 5))
      >>> state = ddpm.p_sample_init(key, chain, (2, 8, 8, 1))
      >>> for _ in range(chain.num_timesteps // 5):  # or tqdm(range(…)), for a bar
      ...     state = run(state)
      >>> int(state.i), state.x_t.shape
      (-1, (2, 8, 8, 1))
    """
    check_schedule(schedule)
    left = schedule.num_timesteps if isinstance(state.i, Tracer) else int(state.i) + 1
    check_whole("steps", steps, 0, left)
    policy = (prediction_type, variance_type, clip_denoised)
    rule, run_network = _rule(sampler), partial(predict, schedule, denoise_fn, *policy)
    draw = noise_source(key, noise_fn, state.x_t, first_sample, sharding)

    def step(state, _):
        i, x_t, memory = state
        x_prev, memory = rule.step(schedule, run_network, draw, i, x_t, memory)
        return SampleState(i - 1, place(x_prev, sharding), memory), None

    return lax.scan(jax.checkpoint(step, prevent_cse=False), state, length=steps)[0]


def _rule(sampler: Sampler | None) -> Sampler:
    sampler = ancestral() if sampler is None else sampler
    check_kind("sampler", sampler, Sampler, "ddim()")
    return sampler
