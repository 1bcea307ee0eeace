"""The programs of the command line, each written once: what `train` runs is what `plan` compiles.

Those of `plan` have shapes in the place of arrays.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jax_ddpm.cli.config import UsageError
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

__all__ = ["computing", "sample_program", "train_program", "training"]


def computing(run: Run, *, dtype: str, remat: bool) -> Run:
    """The run, its network with `--dtype` and `--remat`."""
    model: Any = run.pretrained.model
    if remat:
        if not isinstance(model, UNet):
            raise UsageError("--remat: the tutorial's network has no blocks to recompute")
        model = model.clone(remat=True)
    if dtype != "float32":
        model = model.clone(dtype=jnp.dtype(dtype))
    return run._replace(pretrained=run.pretrained._replace(model=model))


def training(
    run: Run, optimizer: optax.GradientTransformation, mesh: Mesh, **options: Any
) -> tuple[Any, Any]:
    """The training step, and where its state lives: a `TrainState` of `NamedSharding`.

    `options` go to `make_train_step`, beside what the run says.
    """
    pretrained = run.pretrained
    model: Any = pretrained.model
    train_step = make_train_step(
        pretrained.schedule,
        gather_params(model.apply, mesh),
        optimizer,
        prediction_type=pretrained.prediction_type,
        variance_type=pretrained.variance_type,
        loss_type="hybrid" if pretrained.variance_type.startswith("learned") else "mse",
        null_label=run.null_label,
        dropout=isinstance(model, UNet) and model.dropout > 0,
        **options,
    )
    return train_step, state_sharding(mesh, _state(run, optimizer))


def _state(run: Run, optimizer: optax.GradientTransformation) -> Any:
    def init(variables):
        return init_train_state(jax.random.key(0), variables, optimizer)

    return jax.eval_shape(init, run.pretrained.variables)


def train_program(
    run: Run, batch_size: int, devices: list[Any], *, fsdp: int = 1, accumulate: int = 1
) -> tuple[Any, tuple[Any, ...]]:
    """The jitted training step (Adam, clipped gradients, EMA), and its arguments' shapes.

    Raises `ValueError` if `fsdp` does not divide the devices.
    """
    mesh = device_mesh(batch_size // accumulate, fsdp=fsdp, devices=devices)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
    train_step, placement = training(run, optimizer, mesh, accumulate=accumulate)
    step = jax.jit(train_step, donate_argnums=0, out_shardings=(placement, replicated(mesh)))
    state = jax.tree.map(_place, _state(run, optimizer), placement)
    return step, (state, _placed(_batch(run, batch_size), data_sharding(mesh)))


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
            sharding=sharding,
            **pretrained.policy,
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
