"""The jitted programs of a run, each written once: `fit` and `draw` run them, `plan` compiles them.

Where their arguments live is part of a program, so arrays and `ShapeDtypeStruct`s lower to the
same text.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ddpm._typing import PRNGKey
from jax_ddpm.data import Preparation
from jax_ddpm.data.batches import augmentation
from jax_ddpm.guidance import classifier_free_guidance
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.models import UNet
from jax_ddpm.noise import sample_noise
from jax_ddpm.runs.settings import Settings
from jax_ddpm.samplers import Sampler
from jax_ddpm.sampling import SampleState, p_sample_init, p_sample_steps
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training import TrainState, ema_warmup, init_train_state, make_train_step
from jax_ddpm.training.sharding import data_sharding, gather_params, replicated, state_sharding

_PIECES = 20
_AUGMENTATION = 2**31 - 1
"""Folded into the key of a training, whose steps fold in their own numbers, below this one."""


class FitPrograms(NamedTuple):
    """What a training runs."""

    init: Callable[[Any], TrainState]
    """Weights to the state before the first step."""
    to_devices: Callable[[TrainState], TrainState]
    """A state on the host to one on the devices."""
    advance: Any
    """`(state, batches) -> (state, metrics)`: one dispatch, a scan over [step, image, …]. The state
    is donated. Batches have `images`, and `labels` and `extents` where there are any."""
    state: TrainState
    """Shapes, each with its place."""
    batch_sharding: NamedSharding


def fit_programs(run: DiffusionModel, settings: Settings, mesh: Mesh, key: PRNGKey) -> FitPrograms:
    """Training as `settings` say, from `key`, with the state split over the mesh's `fsdp`."""
    model, prepared = run.model, Preparation(**run.preparation)
    transformation = optimizer(settings)
    train_step = make_train_step(
        run.schedule,
        gather_params(model.apply, mesh),
        transformation,
        ema_decay=ema_warmup(settings.ema_decay) if settings.ema_warmup else settings.ema_decay,
        prediction_type=run.prediction_type,
        variance_type=run.variance_type,
        loss_type=settings.loss_type,
        weighting=settings.weighting,
        min_snr_gamma=settings.min_snr_gamma,
        null_label=run.null_label,
        label_dropout=settings.label_dropout,
        dropout=isinstance(model, UNet) and model.dropout > 0,
        accumulate=settings.accumulate,
        skip_nonfinite=True,
        per_sample=True,
    )

    window = prepared.image_size if prepared.crop == "random" else None
    augment = augmentation(window, prepared.flip)

    def step(state, batch):
        step_key = jax.random.fold_in(jax.random.fold_in(key, _AUGMENTATION), state.step)
        images = augment(step_key, batch["images"], batch.get("extents"))
        labels = (batch["labels"],) if run.num_classes is not None else ()
        return train_step(state, (images, *labels))

    def init(params):
        return init_train_state(key, params, transformation)

    shapes = jax.eval_shape(init, run.variables)
    placement = state_sharding(mesh, shapes)
    batches = NamedSharding(mesh, P(None, *data_sharding(mesh).spec))
    whole = replicated(mesh)
    # What is of single samples stays where they are: only the gradient and the loss travel.
    measured = {"loss": whole, "grad_norm": whole, "losses": batches, "t": batches}
    return FitPrograms(
        init=jax.jit(init, out_shardings=placement),
        to_devices=jax.jit(lambda state: state, out_shardings=placement),
        advance=jax.jit(
            lambda state, batches: lax.scan(step, state, batches),
            donate_argnums=0,
            in_shardings=(placement, batches),
            out_shardings=(placement, measured),
        ),
        state=jax.tree.map(_placed, shapes, placement),
        batch_sharding=batches,
    )


def optimizer(settings: Settings) -> optax.GradientTransformation:
    """Adam or AdamW under the learning rate's schedule, of clipped gradients."""
    b1, b2, eps = settings.adam_b1, settings.adam_b2, settings.adam_eps
    rule = optax.adam
    if settings.optimizer == "adamw":
        rule = partial(optax.adamw, weight_decay=settings.weight_decay)
    adam = rule(learning_rate(settings), b1=b1, b2=b2, eps=eps)
    if not settings.grad_clip:
        return adam
    return optax.chain(optax.clip_by_global_norm(settings.grad_clip), adam)


def learning_rate(settings: Settings) -> optax.Schedule:
    """The rate of each step, from 0: a linear warm-up, then what `settings` name."""
    peak, steps = settings.learning_rate, settings.steps
    warmup = min(100, steps // 10) if settings.warmup_steps is None else settings.warmup_steps
    if settings.learning_rate_schedule == "cosine":
        return optax.warmup_cosine_decay_schedule(0, peak, warmup, steps)
    end = peak if settings.learning_rate_schedule == "constant" else 0
    falling = optax.linear_schedule(peak, end, max(steps - warmup, 1))
    if warmup == 0:
        return falling
    return optax.join_schedules([optax.linear_schedule(0, peak, warmup), falling], [warmup])


class DrawPrograms(NamedTuple):
    """What draws a batch of samples."""

    to_devices: Callable[[Any], Any]
    """Weights on the host to every device."""
    init: Callable[[PRNGKey, Any], SampleState]
    """`(key, first_sample) -> state`: x_T."""
    advance: Any
    """`(key, weights, labels, state, first_sample, steps) -> state`: a piece of the chain."""
    arguments: tuple[Any, ...]
    """Shapes of those of `advance`, but for `steps`, each with its place."""


def draw_programs(
    run: DiffusionModel, chain: NoiseSchedule, sampler: Sampler, batch_size: int, mesh: Mesh
) -> DrawPrograms:
    """The reverse chain of `batch_size` samples at once, split over the mesh."""
    data, whole = data_sharding(mesh), replicated(mesh)
    shape = run.shape(batch_size)

    def init(key, first_sample):
        noise = partial(sample_noise, first_sample=first_sample, sharding=data, dtype=jnp.float32)
        x_T = noise(key, chain.num_timesteps, shape)
        return p_sample_init(None, chain, shape, sampler=sampler, x_T=x_T, sharding=data)

    def advance(key, weights, labels, state, first_sample, steps):
        return p_sample_steps(
            key,
            chain,
            guided_denoise_fn(run, weights, labels),
            state,
            steps,
            sampler=sampler,
            first_sample=first_sample,
            sharding=data,
            **run.policy,
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    number = jax.ShapeDtypeStruct((), jnp.int32)
    labels = None if run.num_classes is None else jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    state: Any = jax.eval_shape(init, key, number)
    memory = _memory_sharding(sampler, shape, data)
    states = state._replace(i=whole, x_t=data, memory=memory)
    weights = run.variables
    by_label = None if labels is None else data
    places = (whole, jax.tree.map(lambda _: whole, weights), by_label, states, whole)
    return DrawPrograms(
        to_devices=jax.jit(lambda weights: weights, out_shardings=whole),
        init=jax.jit(init, out_shardings=states),
        advance=jax.jit(advance, static_argnums=5, in_shardings=places, out_shardings=states),
        arguments=jax.tree.map(_placed, (key, weights, labels, state, number), places),
    )


def _memory_sharding(sampler: Sampler, shape: tuple[int, ...], data: NamedSharding) -> Any:
    """A rule may remember arrays with an axis for the samples, such as the step before, which are
    split along it, and others, which are whole on each device."""
    batch, *image = shape
    shapes = (jax.ShapeDtypeStruct((n, *image), jnp.float32) for n in (batch, 2 * batch))
    of_batch, of_twice = (jax.eval_shape(sampler.init, x_T) for x_T in shapes)

    def place(x, other):
        axes = [data.spec[0] if n != m else None for n, m in zip(x.shape, other.shape, strict=True)]
        return NamedSharding(data.mesh, P(*axes))

    return jax.tree.map(place, of_batch, of_twice)


def pieces(chain: NoiseSchedule) -> list[int]:
    """The lengths of the pieces that a chain is drawn in, so that its progress can be shown."""
    piece = -(-chain.num_timesteps // _PIECES)
    whole, rest = divmod(chain.num_timesteps, piece)
    return [piece] * whole + [rest] * (rest > 0)


def guided_denoise_fn(run: DiffusionModel, weights: Any, labels: Any) -> Callable[[Any, Any], Any]:
    """The run's network under its guidance, for these labels if it knows any."""
    model: Any = run.model
    if labels is None:
        return partial(model.apply, weights)

    def conditional(x_t, t):
        return model.apply(weights, x_t, t, labels)

    if run.guidance == 1:
        return conditional
    null_labels = labels * 0 + run.null_label

    def unconditional(x_t, t):
        return model.apply(weights, x_t, t, null_labels)

    return classifier_free_guidance(conditional, unconditional, run.guidance)


def _placed(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(np.shape(x), x.dtype, sharding=sharding)
