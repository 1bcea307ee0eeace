"""Draw many images from a model, a batch at a time over all devices, with a progress bar."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from jax_ddpm._typing import PRNGKey
from jax_ddpm.samplers import Sampler
from jax_ddpm.sampling import p_sample_init, p_sample_steps
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.sharding import data_mesh, data_sharding, replicated

__all__ = ["draw_samples"]

_PIECES = 20


def draw_samples(
    key: PRNGKey,
    schedule: NoiseSchedule,
    apply_fn: Callable[[Any, Array, Array], Any],
    params: Any,
    num: int,
    image_shape: tuple[int, ...],
    sampler: Sampler,
    *,
    batch_size: int = 256,
    watch: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Images [num, *image_shape], float32, sample k the same whatever `num` and `batch_size`.

    `watch` is called with the states of the first batch: x_T, then after every piece of the
    chain.
    """
    # A batch that the devices divide; the samples beyond `num` are drawn and dropped.
    devices = jax.device_count()
    batch_size = -(-min(num, batch_size) // devices) * devices
    mesh = data_mesh(batch_size)
    params = jax.device_put(params, replicated(mesh))
    chain = {"sampler": sampler, "sharding": data_sharding(mesh)}

    @jax.jit
    def init(first_sample):
        shape = (batch_size, *image_shape)
        return p_sample_init(key, schedule, shape, first_sample=first_sample, **chain)

    @partial(jax.jit, static_argnames="steps")
    def advance(params, state, first_sample, steps):
        def denoise_fn(x_t, t):
            return apply_fn(params, x_t, t)

        return p_sample_steps(
            key, schedule, denoise_fn, state, steps, first_sample=first_sample, **chain
        )

    total = schedule.num_timesteps
    piece = -(-total // _PIECES)
    pieces = [piece] * (total // piece) + [total % piece] * (total % piece > 0)
    samples = []
    starts = range(0, num, batch_size)
    with tqdm(total=total * len(starts), desc="sampling", unit="step") as progress:
        for first_sample in starts:
            state = init(first_sample)
            for steps in pieces:
                if watch and first_sample == 0:
                    watch(np.asarray(state.x_t))
                state = jax.block_until_ready(advance(params, state, first_sample, steps))
                progress.update(steps)
            if watch and first_sample == 0:
                watch(np.asarray(state.x_t))
            samples.append(np.asarray(state.x_t))
    return np.concatenate(samples)[:num]
