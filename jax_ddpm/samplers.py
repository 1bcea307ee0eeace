"""Update rules: how one entry of the chain becomes the one before it.

A `Sampler` is two pure functions, as an Optax transformation is. `init` makes what the rule
remembers between steps (nothing, `()`, for the one-step rules), and `step` moves x_t at entry
`i` to x_{t-1}. Inside `step`,

    predict(x_t, i)    one run of the network: `PMeanVariance` at entry i
    noise_fn(i)        the standard normal draw of entry i; a deterministic rule never asks

A rule of your own:

    def step(schedule, predict, noise_fn, i, x_t, memory):
        ...
        return x_prev, memory

    mine = Sampler(init=lambda x_T: (), step=step)
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from jax_ddpm._typing import NoiseFn
from jax_ddpm.forward import predict_eps_from_xstart
from jax_ddpm.reverse import PMeanVariance
from jax_ddpm.schedule import NoiseSchedule, extract

__all__ = ["PredictFn", "Sampler", "ancestral", "ddim"]

PredictFn = Callable[[Array, Array], PMeanVariance]


class Sampler(NamedTuple):
    """An update rule as a pair of pure functions."""

    init: Callable[[Array], Any]
    """`x_T -> memory`"""
    step: Callable[[NoiseSchedule, PredictFn, NoiseFn, Array, Array, Any], tuple[Array, Any]]
    """`(schedule, predict, noise_fn, i, x_t, memory) -> (x_prev, memory)`"""


def ancestral() -> Sampler:
    """Draw x_{t-1} from p_θ(x_{t-1} | x_t): Ho et al. 2020, Algorithm 2. No noise lands on x_0."""

    def step(schedule, predict, noise_fn, i, x_t, memory):
        p = predict(x_t, i)
        x_prev = p.mean + jnp.exp(p.log_variance / 2) * noise_fn(i)
        ends_in_noise = extract(schedule.posterior_variance, i, x_t) > 0
        return jnp.where(ends_in_noise, x_prev, p.mean), memory

    return Sampler(_no_memory, step)


def ddim(eta: float = 0.0) -> Sampler:
    """Song et al. 2021a, eq. 12 and 16: deterministic at `eta` 0, Ho et al.'s chain at 1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: expected 0 to 1, got {eta}")

    def step(schedule, predict, noise_fn, i, x_t, memory):
        x_start = predict(x_t, i).pred_xstart
        eps = predict_eps_from_xstart(schedule, x_t, i, x_start)
        alpha_bar_prev = extract(schedule.alphas_cumprod_prev, i, x_t)
        variance = eta**2 * extract(schedule.posterior_variance, i, x_t)
        direction = jnp.sqrt(jnp.maximum(1 - alpha_bar_prev - variance, 0)) * eps
        x_prev = jnp.sqrt(alpha_bar_prev) * x_start + direction
        if eta > 0:
            x_prev = x_prev + jnp.sqrt(variance) * noise_fn(i)
        return x_prev, memory

    return Sampler(_no_memory, step)


def _no_memory(x_T: Array) -> tuple[()]:
    return ()
