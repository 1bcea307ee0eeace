"""Noise schedules: the numbers of the forward process, made once on the host in float64.

With β_t the variance added at step t (Ho et al. 2020, §2):

    α_t = 1 - β_t                                                                (1)
    ᾱ_t = α_0 α_1 … α_t                                                          (2)
    β̃_t = β_t (1 - ᾱ_{t-1}) / (1 - ᾱ_t)          the posterior's variance         (3)

`t` runs 0 … T - 1 and `t = 0` means one step of noise, so ᾱ before the first entry is 1.

Tables stay float64 on the host and are rounded once, to the dtype of the images they meet
(`extract`). Building them in float32 costs up to 1e-2 in β (cosine, T = 4000).
"""

import warnings
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, Real

from jax_ddpm._errors import (
    FieldError,
    FieldTypeError,
    check_between,
    check_choice,
    check_schedule,
    check_shape,
    check_whole,
    described,
)
from jax_ddpm._typing import AnyArray, Shape, Table, Timestep, Weight

_SIGNAL = 0.05
"""The largest √ᾱ_T that counts as noise; Ho et al.'s is 0.006."""

Spacing = Literal["leading", "trailing", "linspace"]
_Array = Array | np.ndarray
Betas = Float[np.ndarray, "timesteps"]


class NoiseSchedule(NamedTuple):
    """The tables of a chain of T entries, as `make_schedule` and `respace` make them.

    Each is [T], float64 on the host but for `timesteps`. The names are OpenAI's (guided-diffusion).
    The property `num_timesteps` is T; `len` counts the tables.

    Attributes:
      betas, log_betas: β_t, the variance added at entry t, and its logarithm, finite everywhere.
      alphas_cumprod, alphas_cumprod_prev: ᾱ_t, and ᾱ_{t-1}: 1, or `final_alpha_cumprod`, at t = 0.
      sqrt_alphas_cumprod: √ᾱ_t, the share of x_0 in x_t.
      sqrt_one_minus_alphas_cumprod: √(1 - ᾱ_t), the standard deviation of the noise in x_t.
      log_one_minus_alphas_cumprod: log(1 - ᾱ_t).
      sqrt_recip_alphas_cumprod, sqrt_recipm1_alphas_cumprod: √(1 / ᾱ_t) and √(1 / ᾱ_t - 1).
      posterior_variance: β̃_t, the variance of q(x_{t-1} | x_t, x_0); 0 where ᾱ_{t-1} = 1.
      posterior_log_variance_clipped: log β̃_t; where β̃_0 = 0, entry 0 takes the value of entry 1.
      posterior_mean_coef1, posterior_mean_coef2: factors of x_0 and x_t in the posterior's mean.
      half_log_snr, half_log_snr_prev: λ = log(√ᾱ / √(1 - ᾱ)) (Lu et al. 2022) at t and t - 1.
      timesteps: the step number that the network is given, int [T]: 0 … T - 1, or the kept ones
        after `respace`.
    """

    betas: Table
    log_betas: Table
    alphas_cumprod: Table
    alphas_cumprod_prev: Table
    sqrt_alphas_cumprod: Table
    sqrt_one_minus_alphas_cumprod: Table
    log_one_minus_alphas_cumprod: Table
    sqrt_recip_alphas_cumprod: Table
    sqrt_recipm1_alphas_cumprod: Table
    posterior_variance: Table
    posterior_log_variance_clipped: Table
    posterior_mean_coef1: Table
    posterior_mean_coef2: Table
    half_log_snr: Table
    half_log_snr_prev: Table
    timesteps: Int[_Array, "timesteps"]

    @property
    def num_timesteps(self) -> int:
        """T, the number of entries (`len` of a NamedTuple counts its fields)."""
        return self.betas.shape[0]

    def __repr__(self) -> str:
        return f"NoiseSchedule(num_timesteps={getattr(self.betas, 'size', 'unknown')})"


def linear_beta_schedule(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Betas:
    """β linear in t, float64 [T] (Ho et al. 2020, §4).

    Args:
      timesteps: T. The default β fit T = 1000; for another T, multiply both by 1000 / T.
      beta_start, beta_end: the first and the last β.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> round(float(schedule.sqrt_alphas_cumprod[-1]), 5)  # the share of the image in x_T
      0.00635
    """
    check_whole("timesteps", timesteps, 1)
    return np.linspace(beta_start, beta_end, timesteps, dtype=np.float64)


def scaled_linear_beta_schedule(
    timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Betas:
    """√β linear in t, float64 [T] (Rombach et al. 2022).

    Args:
      timesteps: T.
      beta_start, beta_end: the first and the last β; Stable Diffusion has 0.00085 and 0.012.

    Examples:
      >>> ddpm.scaled_linear_beta_schedule(3, 0.01, 0.09).round(6)
      array([0.01, 0.04, 0.09])
    """
    check_whole("timesteps", timesteps, 1)
    return np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2


def cosine_beta_schedule(timesteps: int, s: float = 0.008, max_beta: float = 0.999) -> Betas:
    """β for which ᾱ is a squared cosine, float64 [T] (Nichol & Dhariwal 2021, eq. 17).

    Args:
      timesteps: T; the defaults suit any.
      s: offset that keeps β from vanishing near t = 0.
      max_beta: upper limit of β, which the last entry reaches.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.cosine_beta_schedule(1000))
      >>> round(float(schedule.alphas_cumprod[499]), 2), float(schedule.betas[-1])
      (0.49, 0.999)
    """
    alpha_bar = np.cos((_time(timesteps) + s) / (1 + s) * np.pi / 2) ** 2
    return np.minimum(_betas(alpha_bar), max_beta)


def sigmoid_beta_schedule(
    timesteps: int, start: float = -3.0, end: float = 3.0, tau: float = 1.0
) -> Betas:
    """β for which ᾱ is a sigmoid from 1 to 0, float64 [T] (Jabri et al. 2022, Algorithm 4).

    Args:
      timesteps: T; the defaults suit any. β is at most 0.999.
      start, end, tau: the part of the sigmoid that is used, and its temperature.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.sigmoid_beta_schedule(1000))
      >>> round(float(schedule.alphas_cumprod[499]), 6)  # a sigmoid is symmetric
      0.5
    """
    sigmoid = 1 / (1 + np.exp(-(start + _time(timesteps) * (end - start)) / tau))
    alpha_bar = (sigmoid[-1] - sigmoid) / (sigmoid[-1] - sigmoid[0])
    return np.minimum(_betas(alpha_bar), 0.999)


def rescale_zero_terminal_snr(betas: Any) -> Betas:
    """β whose √ᾱ is shifted and scaled so that x_T is pure noise (Lin et al. 2024, Algorithm 1).

    The first ᾱ is kept and the last becomes 0, so the last β is 1. A network that predicts ε
    knows nothing at that step: train it with `"v_prediction"`.

    Args:
      betas: β of any schedule, [T].

    Raises:
      ValueError: `betas` does not fit, as in `make_schedule`.

    Examples:
      >>> betas = ddpm.rescale_zero_terminal_snr(ddpm.linear_beta_schedule(1000))
      >>> ddpm.make_schedule(betas).alphas_cumprod[[0, -1]]
      array([0.9999, 0.    ])
    """
    sqrt_alpha_bar = np.sqrt(np.cumprod(1 - _valid(betas)))
    if sqrt_alpha_bar.size == 1:
        return np.ones(1)  # the last step is the first
    first, last = sqrt_alpha_bar[0], sqrt_alpha_bar[-1]
    alpha_bar = ((sqrt_alpha_bar - last) * first / (first - last)) ** 2
    return _betas(np.append(1.0, alpha_bar))


def make_schedule(betas: Any) -> NoiseSchedule:
    """All tables of the forward process and its posterior.

    Args:
      betas: β (not α = 1 - β, nor ᾱ), [T], for example from `linear_beta_schedule`.

    Raises:
      ValueError: a β lies outside (0, 1] or is too small to change 1 - β in float64. Only the last
        may be 1: then x_T is pure noise.

    Examples:
      >>> schedule = ddpm.make_schedule([0.5, 0.5])
      >>> schedule.num_timesteps, schedule.alphas_cumprod
      (2, array([0.5 , 0.25]))
    """
    betas = _valid(betas)
    return _tables(np.cumprod(1 - betas), np.arange(betas.size), betas=betas)


def spaced_timesteps(
    timesteps: int, steps: int | str, spacing: Spacing = "leading"
) -> Int[np.ndarray, "steps"]:
    """The entries that a chain of `steps` keeps of `timesteps`, ascending, int [steps].

    Pass them to `respace`, which makes the short chain.

    Args:
      timesteps: T of the training schedule.
      steps: number of entries to keep, 1 … T; or OpenAI's `timestep_respacing`, spacing included:
        `"250"` keeps both ends, `"10,15,20"` so many entries of each equal part of the chain with
        both ends of each, `"ddim25"` every n-th entry, 25 in all, and `""` all.
      spacing: `"leading"` counts up from 0, `"trailing"` down from T - 1, and `"linspace"` keeps
        both ends (Lin et al. 2024, Table 2); rounded as diffusers does. For few steps use
        `"trailing"`: a `"leading"` chain starts below T - 1, where the image still shows.

    Raises:
      ValueError: `steps` lies outside 1 … T, or there are no such entries.

    Examples:
      >>> ddpm.spaced_timesteps(1000, 4)
      array([  0, 250, 500, 750])
      >>> ddpm.spaced_timesteps(1000, 4, "trailing")
      array([249, 499, 749, 999])
    """
    check_whole("timesteps", timesteps, 1)
    if isinstance(steps, str):
        return _respacing(timesteps, steps)
    check_whole("steps", steps, 1, timesteps)
    check_choice("spacing", spacing, Spacing)
    if spacing == "leading":
        return np.arange(steps) * (timesteps // steps)
    if spacing == "trailing":
        descending = np.round(timesteps - np.arange(steps) * (timesteps / steps)) - 1
        return descending[::-1].astype(np.int64)
    return np.round(np.linspace(0, timesteps - 1, steps)).astype(np.int64)


def _respacing(timesteps: int, words: str) -> np.ndarray:
    entries, kept = np.arange(timesteps), []
    if not words:
        return entries
    try:
        counts = [int(count) for count in words.removeprefix("ddim").split(",")]
    except ValueError:
        counts = [0]
    if words.startswith("ddim"):
        chains = (entries[::stride] for stride in range(1, timesteps + 1))
        kept = [chain for chain in chains if [chain.size] == counts][:1]
    else:
        for part, count in zip(np.array_split(entries, len(counts)), counts, strict=True):
            check_whole("steps", count, 0, part.size)
            stride = (part.size - 1) / max(count - 1, 1)
            # Added up one by one, as there: halves are rounded by what the sum has lost.
            kept.append(part[np.round(np.cumsum([0, *[stride] * count])[:count]).astype(int)])
    if not sum(map(len, kept)):
        expected = f"counts that equal parts, or a whole stride, of {timesteps} steps give"
        raise FieldError("steps", f"expected {expected}, got {words!r}")
    return np.concatenate(kept)


def respace(
    schedule: NoiseSchedule, timesteps: Any, *, final_alpha_cumprod: float = 1.0
) -> NoiseSchedule:
    """The schedule of a shorter chain, which visits only some entries: sampling in fewer steps.

    A strided chain is a shorter chain with β_i = 1 - ᾱ_i / ᾱ_{i-1} over the kept entries (Nichol &
    Dhariwal 2021, §4). Every sampler runs on it unchanged, and the network still gets the timesteps
    of its training. `classifier_guidance` and `reconstruction_guidance` take the full schedule.

    Args:
      schedule: the schedule of training.
      timesteps: the entries to keep, ascending, [steps], for example from `spaced_timesteps`.
      final_alpha_cumprod: ᾱ at the end of the chain. 1 is the image itself; a smaller value, at
        least ᾱ of the first kept entry, leaves some noise (ᾱ_0 is diffusers'
        `set_alpha_to_one=False` and `"sigma_min"`).

    Raises:
      ValueError: the entries are not ascending or a value is out of range.

    Examples:
      >>> schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(1000))
      >>> chain = ddpm.respace(schedule, ddpm.spaced_timesteps(1000, 4, "trailing"))
      >>> chain.num_timesteps, chain.timesteps
      (4, array([249, 499, 749, 999]))
      >>> denoise_fn = lambda x_t, t: 0.1 * x_t  # your network, given t = 999, 749, 499, 249
      >>> ddpm.p_sample_loop(jax.random.key(0), chain, denoise_fn, (2, 8, 8, 1)).shape
      (2, 8, 8, 1)
    """
    check_schedule(schedule)
    kept = np.asarray(timesteps)
    check_whole("timesteps", kept, 0, schedule.num_timesteps - 1)
    if kept.ndim != 1 or not kept.size or np.any(np.diff(kept) <= 0):
        raise FieldError("timesteps", f"expected ascending entries [steps], got {kept}")
    alphas_cumprod = np.asarray(schedule.alphas_cumprod)[kept]
    check_between("final_alpha_cumprod", final_alpha_cumprod, alphas_cumprod[0], 1)
    return _tables(alphas_cumprod, np.asarray(schedule.timesteps)[kept], final_alpha_cumprod)


def extract(
    table: Real[_Array, "timesteps"] | Bool[_Array, "timesteps"], t: Timestep, x: AnyArray
) -> Array:
    """`table[t]` in the dtype of `x`, shaped [batch, 1, 1, …] to multiply it.

    The gather runs on the device. JAX alone would clamp entries out of range in silence.

    Args:
      table: a table of a schedule, [T].
      t: entries of the chain, 0 … T - 1, [batch] or [] for all.
      x: a floating array [batch, …].

    Raises:
      ValueError: `x` is not floating, or `t` has another shape or a concrete entry out of range.

    Examples:
      >>> schedule, x = ddpm.make_schedule([0.5, 0.5]), jnp.ones((2, 8, 8, 3))
      >>> ddpm.extract(schedule.alphas_cumprod, jnp.array([0, 1]), x).shape
      (2, 1, 1, 1)
    """
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise FieldTypeError("x", f"expected a floating dtype, got {dtype}")
    check_entries(t, table.shape[0], jnp.shape(x))
    return _aligned(look_up(jnp.asarray(table, dtype), t, t), x)


def look_up(table: Any, index: Any, like: Any, mode: str | None = None) -> Array:
    """`table[index]`, sharded as the first axis of `like`: meshes of Explicit axes demand it."""
    sharding = jax.typeof(like).sharding
    placed = NamedSharding(sharding.mesh, P(*sharding.spec[:1]))
    wraps = mode != "fill"
    return table.at[index].get(mode=mode, out_sharding=placed, wrap_negative_indices=wraps)


def warn_of_signal(schedule: NoiseSchedule) -> None:
    """Warns if x_T still holds some of the image (Lin et al. 2024, §3.1).

    The chain starts from N(0, I), but the network was trained on x_T with √ᾱ_T of an image in it,
    and reads the image's brightness from the mean of the noise, near 0.
    """
    if isinstance(schedule.sqrt_alphas_cumprod, Tracer):
        return
    signal = np.asarray(schedule.sqrt_alphas_cumprod)[-1]
    if signal <= _SIGNAL:
        return
    remedy = "train on a cosine or sigmoid schedule, or with β times 1000 / T"
    if np.asarray(schedule.timesteps)[-1] >= schedule.num_timesteps:  # respaced
        remedy = f'use spacing "trailing" or, where that does not help, {remedy}'
    warnings.warn(
        f"schedule: √ᾱ_T is {signal:.3g}: the chain starts from pure noise, where the network "
        f"learns from noise with an image in it, so samples get a wrong brightness; {remedy}",
        stacklevel=1,  # said once, whoever calls
    )


def per_sample(name: str, value: Weight, x: Array) -> Array:
    """One number, or one per sample, in the dtype of `x`, shaped [batch, 1, 1, …] to meet it."""
    value = jnp.asarray(value, dtype=x.dtype)
    check_shape(name, value, x.shape[:1], (), (*x.shape[:1], *[1] * (x.ndim - 1)))
    return _aligned(value, x)


def _valid(betas: Any) -> Betas:
    values = np.asarray(betas)
    if values.dtype.kind not in "fiu" or values.ndim != 1 or not values.size:
        expected = "an array [timesteps], such as linear_beta_schedule(1000)"
        raise FieldTypeError("betas", f"expected {expected}, got {described(betas)}")
    values = values.astype(np.float64)
    valid = (1 - values < 1) & (values <= 1) & np.append(values[:-1] < 1, True)
    if not np.all(valid):
        worst = values[np.argmin(valid)]
        raise FieldError("betas", f"expected values in (0, 1], 1 only at the end, got {worst}")
    return values


def _time(timesteps: int) -> np.ndarray:
    """From 0 to 1, [timesteps + 1]."""
    check_whole("timesteps", timesteps, 1)
    return np.arange(timesteps + 1, dtype=np.float64) / int(timesteps)


def _betas(alpha_bar: np.ndarray) -> Betas:
    """β of ᾱ, which starts with the 1 before the first entry."""
    return 1 - alpha_bar[1:] / alpha_bar[:-1]


def _aligned(values: Array, x: Any) -> Array:
    return values.reshape(values.shape + (1,) * (jnp.ndim(x) - values.ndim))


@np.errstate(divide="ignore")  # 1 / ᾱ where ᾱ = 0 at the end, λ where ᾱ is 0 or 1
def _tables(
    alphas_cumprod: Betas, timesteps: np.ndarray, end: float = 1.0, betas: Betas | None = None
) -> NoiseSchedule:
    alphas_cumprod_prev = np.append(end, alphas_cumprod[:-1])
    betas = 1 - alphas_cumprod / alphas_cumprod_prev if betas is None else betas
    # 1 - ᾱ_t without the cancellation of 1 - ᾱ_0 ≈ 1 - 0.9999: there it is β_0 to the bit, and
    # the posterior's mean is x_0 itself.
    noise_variance = betas + (1 - betas) * (1 - alphas_cumprod_prev)
    posterior_variance = betas * (1 - alphas_cumprod_prev) / noise_variance  # (3)
    # β̃_0 = 0 has no logarithm: entry 0 takes entry 1, as OpenAI does (Ho et al. clip at 1e-20).
    # A chain of one entry has no entry 1, and its only step adds no noise.
    first = posterior_variance[:1]
    if first == 0:
        first = posterior_variance[1:2] if betas.size > 1 else betas
    recip_alphas_cumprod = 1 / alphas_cumprod
    half_log_snr = (np.log(alphas_cumprod) - np.log(noise_variance)) / 2
    half_log_snr_end = (np.log(end) - np.log(1 - end)) / 2
    return NoiseSchedule(
        betas=betas,
        # A final step with β = 0 has no logarithm either.
        log_betas=np.log(np.append(betas[:1] if betas[0] > 0 else first, betas[1:])),
        alphas_cumprod=alphas_cumprod,
        alphas_cumprod_prev=alphas_cumprod_prev,
        sqrt_alphas_cumprod=np.sqrt(alphas_cumprod),
        sqrt_one_minus_alphas_cumprod=np.sqrt(noise_variance),
        log_one_minus_alphas_cumprod=np.log(noise_variance),
        sqrt_recip_alphas_cumprod=np.sqrt(recip_alphas_cumprod),
        sqrt_recipm1_alphas_cumprod=np.sqrt(recip_alphas_cumprod * noise_variance),
        posterior_variance=posterior_variance,
        posterior_log_variance_clipped=np.log(np.append(first, posterior_variance[1:])),
        posterior_mean_coef1=betas * np.sqrt(alphas_cumprod_prev) / noise_variance,
        posterior_mean_coef2=(1 - alphas_cumprod_prev) * np.sqrt(1 - betas) / noise_variance,
        half_log_snr=half_log_snr,
        half_log_snr_prev=np.append(half_log_snr_end, half_log_snr[:-1]),
        timesteps=timesteps,
    )


def check_entries(t: Any, size: int, x_shape: Shape) -> None:
    check_whole("t", t, 0, size - 1)
    check_shape("t", t, x_shape[:1], ())
