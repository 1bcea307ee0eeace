"""The programs that are planned: the training step and the sampler, as `train` and `sample` run
them, with shapes in the place of arrays."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from jax_ddpm.cli.draw import guided_denoise_fn
from jax_ddpm.cli.runs import Run
from jax_ddpm.models import UNet
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.training import init_train_state, make_train_step
from jax_ddpm.training.sharding import (
    data_sharding,
    device_mesh,
    gather_params,
    replicated,
    state_sharding,
)

__all__ = ["sample_program", "train_program"]


def train_program(
    run: Run, batch_size: int, devices: list[Any], *, fsdp: int = 1, accumulate: int = 1
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted training step (Adam, clipped gradients, EMA), and its arguments' shapes.

    Raises `ValueError` if `fsdp` does not divide the devices.
    """
    mesh = device_mesh(batch_size // accumulate, fsdp=fsdp, devices=devices)
    model: Any = run.pretrained.model
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    train_step = make_train_step(
        run.pretrained.schedule,
        gather_params(model.apply, mesh) if fsdp > 1 else model.apply,
        optimizer,
        prediction_type=run.pretrained.prediction_type,
        variance_type=run.pretrained.variance_type,
        loss_type="hybrid" if run.pretrained.variance_type.startswith("learned") else "mse",
        null_label=run.null_label,
        dropout=isinstance(model, UNet) and model.dropout > 0,
        accumulate=accumulate,
    )
    state = jax.eval_shape(
        lambda variables: init_train_state(jax.random.key(0), variables, optimizer),
        run.pretrained.variables,
    )
    placement = state_sharding(mesh, state)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
    batch = _placed(_batch(run, batch_size), data_sharding(mesh))
    return step, (jax.tree.map(_place, state, placement), batch)


def sample_program(
    run: Run, num: int, steps: int, devices: list[Any]
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted reverse chain (ancestral) of `num` images at once, and its arguments' shapes."""
    mesh = device_mesh(num, devices=devices)
    sharding = data_sharding(mesh)
    pretrained = run.pretrained
    chain = pretrained.schedule
    if steps < chain.num_timesteps:
        chain = pretrained.chain(steps)

    @partial(jax.jit, out_shardings=sharding)
    def sample(key, variables, *labels):
        return p_sample_loop(
            key,
            chain,
            guided_denoise_fn(run, variables, labels[0] if labels else None),
            (num, *run.image_shape),
            prediction_type=pretrained.prediction_type,
            variance_type=pretrained.variance_type,
            clip_denoised=pretrained.clip_denoised,
            sharding=sharding,
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    _, *labels = _batch(run, num)
    arguments = _placed((key, pretrained.variables), replicated(mesh))
    return sample, (*arguments, *_placed(labels, sharding))


def _batch(run: Run, size: int) -> tuple[Any, ...]:
    images = jax.ShapeDtypeStruct((size, *run.image_shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    return (images,) if run.num_classes is None else (images, labels)


def _placed(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(lambda x: _place(x, sharding), tree)


def _place(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
