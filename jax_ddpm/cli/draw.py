"""Draw many images from a model, a batch at a time over all devices, with a progress bar."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from jax_ddpm._typing import PRNGKey
from jax_ddpm.cli.progress import progress
from jax_ddpm.cli.runs import Run
from jax_ddpm.guidance import classifier_free_guidance
from jax_ddpm.noise import sample_noise
from jax_ddpm.samplers import Sampler
from jax_ddpm.sampling import p_sample_init, p_sample_steps
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training.hosts import to_hosts
from jax_ddpm.training.sharding import data_sharding, device_mesh, replicated

__all__ = ["class_columns", "cycle_labels", "draw_samples", "guided_denoise_fn"]

_PIECES = 20


def class_columns(run: Run) -> int | None:
    """Columns of a grid in which each holds one class, or None if there are too many, or none."""
    return run.num_classes if run.num_classes and run.num_classes <= 16 else None


def cycle_labels(run: Run, num: int) -> np.ndarray | None:
    """0, 1, 2, … in turn, or None for a model without classes."""
    if run.num_classes is None:
        return None
    return np.arange(num, dtype=np.int32) % run.num_classes


def draw_samples(
    key: PRNGKey,
    run: Run,
    schedule: NoiseSchedule,
    num: int,
    sampler: Sampler,
    *,
    labels: np.ndarray | None = None,
    batch_size: int = 256,
    watch: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Images [num, *run.image_shape], float32, sample k the same whatever `num` and `batch_size`.

    `watch` is called with the states of the first batch: x_T, then after every piece of the
    chain.
    """
    # A batch that the devices divide; the samples beyond `num` are drawn and dropped.
    devices = jax.device_count()
    batch_size = -(-min(num, batch_size) // devices) * devices
    mesh = device_mesh(batch_size)
    sharding = data_sharding(mesh)
    params = jax.jit(lambda params: params, out_shardings=replicated(mesh))(
        run.pretrained.variables
    )

    @jax.jit
    def init(first_sample):
        shape = (batch_size, *run.image_shape)
        x_T = sample_noise(
            key,
            schedule.num_timesteps,
            shape,
            first_sample=first_sample,
            sharding=sharding,
            dtype=jax.numpy.float32,
        )
        return p_sample_init(None, schedule, shape, sampler=sampler, x_T=x_T, sharding=sharding)

    @partial(jax.jit, static_argnames="steps")
    def advance(params, labels, state, first_sample, steps):
        return p_sample_steps(
            key,
            schedule,
            guided_denoise_fn(run, params, labels),
            state,
            steps,
            sampler=sampler,
            first_sample=first_sample,
            sharding=sharding,
            **run.pretrained.policy,
        )

    total = schedule.num_timesteps
    piece = -(-total // _PIECES)
    pieces = [piece] * (total // piece) + [total % piece] * (total % piece > 0)
    samples = []
    starts = range(0, num, batch_size)
    with progress(total * len(starts), "sampling") as shown:
        for first_sample in starts:
            state = init(first_sample)
            here = None
            if labels is not None:
                here = np.resize(labels[first_sample : first_sample + batch_size], batch_size)
            for steps in pieces:
                if watch and first_sample == 0:
                    watch(to_hosts(state.x_t, mesh))
                state = jax.block_until_ready(advance(params, here, state, first_sample, steps))
                shown.update(steps)
            if watch and first_sample == 0:
                watch(to_hosts(state.x_t, mesh))
            samples.append(to_hosts(state.x_t, mesh))
    return np.concatenate(samples)[:num]


def guided_denoise_fn(run: Run, params: Any, labels: Any) -> Callable[[Any, Any], Any]:
    """The run's network under its guidance, for these labels if it knows any."""
    model: Any = run.pretrained.model
    if labels is None:
        return lambda x_t, t: model.apply(params, x_t, t)

    def conditional(x_t, t):
        return model.apply(params, x_t, t, labels)

    if run.guidance == 1:
        return conditional
    null_labels = labels * 0 + run.null_label

    def unconditional(x_t, t):
        return model.apply(params, x_t, t, null_labels)

    return classifier_free_guidance(conditional, unconditional, run.guidance)
