"""What a step costs beyond the network: the whole loop around a network that does nothing.

With noise (Ho et al.'s chain) and without (DDIM): of the first, nearly all is drawing the noise.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

import jax_ddpm as ddpm
from benchmarks.settings import Settings
from benchmarks.timing import interleave

__all__ = ["run"]

_SHAPE = (1, 8, 8, 3)


def run(settings: Settings, log: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """Time one image of 8×8×3 through `overhead_steps` steps, each side drawing its noise."""
    steps = settings.overhead_steps
    key = jax.random.key(0)
    schedule = ddpm.make_schedule(ddpm.linear_beta_schedule(steps))

    def nothing(x, t):
        return x

    def scan(**policy):
        loop = jax.jit(lambda key: ddpm.p_sample_loop(key, schedule, nothing, _SHAPE, **policy))
        return lambda: jax.block_until_ready(loop(key))

    stepwise = jax.jit(lambda state: ddpm.p_sample_steps(key, schedule, nothing, state, 1))

    def python_loop():
        state = ddpm.p_sample_init(key, schedule, _SHAPE)
        for _ in range(steps):
            state = stepwise(state)
        return state.x_t

    np.testing.assert_allclose(python_loop(), scan()(), atol=1e-6)
    runs = {
        "JAX, one scan": scan(),
        "JAX, one scan, DDIM": scan(sampler=ddpm.ddim()),
        "diffusers DDPMScheduler.step": partial(_diffusers_loop, DDPMScheduler(steps)),
        "diffusers DDIMScheduler.step": partial(_diffusers_loop, DDIMScheduler(steps)),
    }
    log(f"overhead: {steps:,} steps of a network that does nothing …")
    times = interleave(runs, settings.rounds)
    return [
        {"contender": name, "seconds_per_step": [seconds / steps for seconds in times[name]]}
        for name in runs
    ]


@torch.no_grad()
def _diffusers_loop(scheduler: Any) -> torch.Tensor:
    x = torch.randn(_SHAPE)
    scheduler.set_timesteps(len(scheduler.betas))
    for t in scheduler.timesteps:
        x = scheduler.step(x, t, x).prev_sample
    return x
