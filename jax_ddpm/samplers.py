"""Update rules: how one entry of the chain becomes the one before it.

A `Sampler` is two pure functions, like an Optax transformation. All but the multistep rule take
x_{t-1} from x_t alone.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jax_ddpm._errors import check_between, check_choice, check_positive
from jax_ddpm._typing import NoiseFn
from jax_ddpm.forward import predict_eps_from_xstart
from jax_ddpm.reverse import Prediction
from jax_ddpm.schedule import NoiseSchedule, extract

PredictFn = Callable[[Array, Array], Prediction]
"""`(x_t, i) -> Prediction`: one run of the network at entry i."""

InitFn = Callable[[Array], Any]


class StepFn(Protocol):
    """One step of a rule: `Sampler` describes the arguments and the result."""

    def __call__(
        self,
        schedule: NoiseSchedule,
        predict: PredictFn,
        noise_fn: NoiseFn,
        i: Array,
        x_t: Array,
        memory: Any,
        /,
    ) -> tuple[Array, Any]: ...


class Sampler(NamedTuple):
    """An update rule as a pair of pure functions, which `p_sample_loop` calls.

    Attributes:
      init: `x_T -> memory`, a pytree of arrays for the first step; `()` for a one-step rule.
      step: `(schedule, predict, noise_fn, i, x_t, memory) -> (x_{t-1}, memory)`. i is the entry, an
        int32 scalar, T - 1 … 0. `predict(x_t, i)` runs the network and returns the fields of
        `PMeanVariance` and `eps`, from x̂_0 before clipping; it may be called several times.
        `noise_fn(i)` is the draw of an entry, in the shape of x_t; a deterministic rule never asks.
        x_{t-1} has the shape and dtype of x_t, and memory goes from step to step.
      name: the rule and its options, for records.

    Examples:
      >>> def step(schedule, predict, noise_fn, i, x_t, memory):  # DDIM
      ...     x_start = predict(x_t, i).pred_xstart
      ...     eps = ddpm.predict_eps_from_xstart(schedule, x_t, i, x_start)
      ...     alpha_bar = ddpm.extract(schedule.alphas_cumprod_prev, i, x_t)
      ...     return jnp.sqrt(alpha_bar) * x_start + jnp.sqrt(1 - alpha_bar) * eps, memory
      >>> mine = ddpm.Sampler(init=lambda x_T: (), step=step)
      >>> key, chain = jax.random.key(0), ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> network = lambda x_t, t: 0.1 * x_t
      >>> draw = lambda rule: ddpm.p_sample_loop(key, chain, network, (2, 8, 8, 1), sampler=rule)
      >>> bool(jnp.allclose(draw(mine), draw(ddpm.ddim()), atol=1e-5))
      True
    """

    init: InitFn
    step: StepFn
    name: str = ""


def ancestral() -> Sampler:
    """Draw x_{t-1} from p_θ(x_{t-1} | x_t): Ho et al. 2020, Algorithm 2. No noise lands on x_0.

    Examples:
      >>> key, chain = jax.random.key(0), ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> network = lambda x_t, t: 0.1 * x_t
      >>> draw = lambda rule: ddpm.p_sample_loop(key, chain, network, (2, 8, 8, 1), sampler=rule)
      >>> bool(jnp.allclose(draw(ddpm.ancestral()), draw(ddpm.ddim(eta=1.0)), atol=1e-4))
      True
    """

    def step(schedule, predict, noise_fn, i, x_t, memory):
        p = predict(x_t, i)
        x_prev = p.mean + jnp.exp(p.log_variance / 2) * noise_fn(i)
        ends_in_noise = extract(schedule.posterior_variance, i, x_t) > 0
        return jnp.where(ends_in_noise, x_prev, p.mean), memory

    return Sampler(lambda x_T: (), step, "ancestral")


def ddim(eta: float = 0.0, *, use_clipped_model_output: bool = True) -> Sampler:
    """DDIM, Song et al. 2021a, eq. 12 and 16: deterministic at `eta` 0, Ho et al.'s chain at 1.

    Args:
      eta: share of the posterior's standard deviation that is drawn as noise, in [0, 1].
      use_clipped_model_output: whether ε is recomputed from a clipped x̂_0, so that x_t still mixes
        the two. False, diffusers' default, leaves ε the network's own.

    Examples:
      >>> chain = ddpm.make_schedule(ddpm.linear_beta_schedule(10, 0.01, 0.2))
      >>> x_T, zeros = jnp.ones((1, 8, 8, 1)), lambda x_t, t: 0 * x_t  # without noise to remove
      >>> options = {"sampler": ddpm.ddim(), "x_T": x_T, "clip_denoised": False}
      >>> x_0 = ddpm.p_sample_loop(None, chain, zeros, x_T.shape, **options)
      >>> bool(jnp.allclose(x_0, x_T / chain.sqrt_alphas_cumprod[-1]))  # x_T is scaled
      True
    """
    check_between("eta", eta, 0, 1)

    def step(schedule, predict, noise_fn, i, x_t, memory):
        p = predict(x_t, i)
        x_start = p.pred_xstart
        eps = p.eps
        if use_clipped_model_output:
            eps = predict_eps_from_xstart(schedule, x_t, i, x_start)
        alpha_bar_prev = extract(schedule.alphas_cumprod_prev, i, x_t)
        variance = eta**2 * extract(schedule.posterior_variance, i, x_t)
        direction = jnp.sqrt(jnp.maximum(1 - alpha_bar_prev - variance, 0)) * eps
        x_prev = jnp.sqrt(alpha_bar_prev) * x_start + direction
        if eta > 0:
            x_prev = x_prev + jnp.sqrt(variance) * noise_fn(i)
        return x_prev, memory

    name = f"ddim, eta {eta}, use_clipped_model_output {use_clipped_model_output}"
    return Sampler(lambda x_T: (), step, name)


def dpm_solver_pp(order: Literal[1, 2, 3] = 2, *, stochastic: bool = False) -> Sampler:
    """Multistep DPM-Solver++ (Lu et al. 2022b, Algorithm 2), for few steps.

    In λ = log(α / σ), with h = λ' - λ, and k = 1 for the ODE, 2 for the SDE:

        x' = (σ' / σ) e^{-(k-1)h} x + α' k ∫ e^{-k(λ' - s)} x̂_0(s) ds + σ' √(1 - e^{-2h}) noise

    where only the SDE has noise, and x̂_0(s) is extrapolated from this entry's and those before:
    the first step has order 1, the second at most 2. Where h is infinite, onto x_0, order 1 is
    exact. Order 2 is the paper's and diffusers' "midpoint".

    Order 3 weighs x̂_0'' exactly; diffusers gives it half that weight, which leaves an error of
    second order. It extrapolates far, and needs steps of like length in λ:
    space them `"trailing"`, since the last steps of other spacings are each several times the
    one before, and order 2 is better there.

    Args:
      order: 1, 2 or 3. Order 1 of the ODE is `ddim()`.
      stochastic: whether the rule solves the SDE.

    Examples:
      >>> key, chain = jax.random.key(0), ddpm.make_schedule(ddpm.cosine_beta_schedule(10))
      >>> network = lambda x_t, t: 0.1 * x_t
      >>> draw = lambda rule: ddpm.p_sample_loop(key, chain, network, (2, 8, 8, 1), sampler=rule)
      >>> bool(jnp.allclose(draw(ddpm.dpm_solver_pp(1)), draw(ddpm.ddim()), atol=1e-4))
      True
    """
    check_choice("order", order, (1, 2, 3))
    k = 2 if stochastic else 1

    def init(x_T):
        if order == 1:
            return ()
        return (jnp.int32(0), *[jnp.zeros_like(x_T)] * (order - 1))

    def step(schedule, predict, noise_fn, i, x_t, memory):
        m_0 = predict(x_t, i).pred_xstart
        h = _log_snr_step(schedule, i, x_t)
        A = -jnp.expm1(-k * h)
        integral = A * m_0
        if order > 1:
            done, *older = memory
            integral = integral + _higher_order(schedule, i, k, A, done, m_0, *older)
            memory = (done + 1, m_0, *older[: order - 2])
        alpha_prev = extract(schedule.alphas_cumprod_prev**0.5, i, x_t)
        sigma_prev = extract((1 - schedule.alphas_cumprod_prev) ** 0.5, i, x_t)
        shrink = sigma_prev / extract(schedule.sqrt_one_minus_alphas_cumprod, i, x_t)
        if not stochastic:
            return shrink * x_t + alpha_prev * integral, memory
        x_prev = shrink * jnp.exp(-h) * x_t + alpha_prev * integral
        return x_prev + sigma_prev * jnp.sqrt(A) * noise_fn(i), memory

    name = f"dpm_solver_pp, k {k}, order {order}, stochastic {stochastic}"
    return Sampler(init, step, name)


def heun(*, max_slope: float = 10.0) -> Sampler:
    """Heun's method of second order, deterministic (Karras et al. 2022, Algorithm 1, S_churn = 0).

    In x̂ = x / √ᾱ and σ̂ = √(1 - ᾱ) / √ᾱ the ODE is dx̂ / dσ̂ = ε. A step is DDIM's, corrected by ε at
    the entry where it lands: two runs of the network. The correction and its run are skipped at the
    end of the chain, which has no next entry, and where σ̂ falls too steeply.

    Args:
      max_slope: corrections are skipped where √ᾱ' σ̂ is above this positive number.
        A correction multiplies an error of ε by half of √ᾱ' σ̂, which is large in the last entries
        of a cosine schedule. Short steps stay below 1, so all are corrected and the order is 2.
    """
    check_positive(max_slope=max_slope)

    def step(schedule, predict, noise_fn, i, x_t, memory):
        alpha_prev = extract(schedule.alphas_cumprod_prev**0.5, i, x_t)
        sigma_prev = extract((1 - schedule.alphas_cumprod_prev) ** 0.5, i, x_t)
        x_start = predict(x_t, i).pred_xstart
        eps = predict_eps_from_xstart(schedule, x_t, i, x_start)
        x_prev = alpha_prev * x_start + sigma_prev * eps
        slope = alpha_prev * extract(schedule.sqrt_recipm1_alphas_cumprod, i, x_t)

        def correct(x_prev):
            ahead = i - 1
            x_start = predict(x_prev, ahead).pred_xstart
            eps_ahead = predict_eps_from_xstart(schedule, x_prev, ahead, x_start)
            span = sigma_prev - slope  # √ᾱ' (σ̂' - σ̂)
            return x_prev + span / 2 * (eps_ahead - eps)

        inside = (i > 0) & (slope.reshape(()) <= max_slope)
        return lax.cond(inside, correct, lambda x_prev: x_prev, x_prev), memory

    return Sampler(lambda x_T: (), step, f"heun, max_slope {max_slope}")


SAMPLERS = {"ddim": ddim, "ancestral": ancestral, "dpm_solver_pp": dpm_solver_pp, "heun": heun}
"""By the names of the command line, whose flags give the rules their options."""


def _higher_order(schedule, i, k, A, done, m_0, m_1, m_2=None):
    """k ∫ e^{-k(λ' - s)} (x̂_0(s) - m_0) ds, by the polynomial through m_0, m_1 (and m_2).

    `done` is the number of steps taken. Divisors of cases that do not apply are replaced before
    dividing, since a NaN that `where` discards would still poison gradients.
    """
    last = schedule.num_timesteps - 1
    h, h_0, h_1 = (_log_snr_step(schedule, jnp.minimum(i + n, last), m_0) for n in range(3))
    second = (done >= 1) & jnp.isfinite(h) & (h > 0)
    h, h_0 = jnp.where(second, h, 0), jnp.where(second, h_0, 1)
    D1_0 = h / h_0 * (m_0 - m_1)
    midpoint = A / 2 * D1_0
    if m_2 is None:
        return midpoint
    third = second & (done >= 2)
    z, h_0, h_1 = (jnp.where(third, value, 1) for value in (k * h, h_0, h_1))
    bend = D1_0 - h / h_1 * (m_1 - m_2)
    D1 = D1_0 + h_0 / (h_0 + h_1) * bend  # h x̂_0'
    D2 = 2 * h / (h_0 + h_1) * bend  # h² x̂_0''
    phi_1 = 1 - A / z
    phi_2 = 0.5 - phi_1 / z
    return jnp.where(third, phi_1 * D1 + phi_2 * D2, midpoint)


def _log_snr_step(schedule, i, x):
    """h = λ_{i-1} - λ_i: infinite onto x_0, and from where nothing but noise is left."""
    return extract(schedule.half_log_snr_prev - schedule.half_log_snr, i, x)
