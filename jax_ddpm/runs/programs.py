"""The jitted programs of a run, each written once: `fit` and `draw` run them, `plan` compiles them.

Where arrays live is part of a program, so arrays and their shapes lower to the same text.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
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


class FitPrograms(NamedTuple):
    """What a training runs: `init(weights)` is its first state, `to_devices` places one.

    `advance(state, batches) -> (state, metrics)` is one dispatch, a scan over [step, image, …]. The
    state is donated. Batches have `images`, and `labels` and `extents` where there are any.
    """

    init: Callable[[Any], TrainState]
    to_devices: Callable[[TrainState], TrainState]
    advance: Any
    state: TrainState
    """Shapes, each with its place."""
    batch_sharding: NamedSharding


def fit_programs(run: DiffusionModel, settings: Settings, mesh: Mesh, key: PRNGKey) -> FitPrograms:
    """Training as `settings` say, from `key`, with the state split over the mesh's `fsdp`."""
    rule, decay = optimizer(settings), settings.ema_decay
    chosen = ("loss_type", "weighting", "min_snr_gamma", "label_dropout", "accumulate")
    options: Any = {name: getattr(settings, name) for name in chosen}
    for name in ("prediction_type", "variance_type", "null_label"):
        options[name] = getattr(run, name)
    train_step = make_train_step(
        run.schedule,
        gather_params(run.model.apply, mesh),
        rule,
        ema_decay=ema_warmup(decay) if settings.ema_warmup else decay,
        dropout=isinstance(run.model, UNet) and run.model.dropout > 0,
        skip_nonfinite=True,
        per_sample=True,
        **options,
    )
    prepared = Preparation(**run.preparation)
    augment = augmentation(
        prepared.image_size if prepared.crop == "random" else None, prepared.flip
    )

    def step(state, batch):
        # `train_step` folds the number of the step into `key`; no step has this number.
        step_key = jax.random.fold_in(jax.random.fold_in(key, 2**31 - 1), state.step)
        images = augment(step_key, batch["images"], batch.get("extents"))
        labels = (batch["labels"],) if run.num_classes is not None else ()
        return train_step(state, (images, *labels))

    def init(params):
        return init_train_state(key, params, rule)

    placement = state_sharding(mesh, jax.eval_shape(init, run.variables))
    start = jax.jit(init, out_shardings=placement)
    batches, whole = NamedSharding(mesh, P(None, *data_sharding(mesh).spec)), replicated(mesh)
    # What is of single samples stays where they are: only the gradient and the loss travel.
    measured = {"loss": whole, "grad_norm": whole, "losses": batches, "t": batches}
    advance = jax.jit(
        lambda state, batches: lax.scan(step, state, batches),
        donate_argnums=0,
        in_shardings=(placement, batches),
        out_shardings=(placement, measured),
    )
    to_devices = jax.jit(lambda state: state, out_shardings=placement)
    return FitPrograms(start, to_devices, advance, jax.eval_shape(start, run.variables), batches)


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
    rest = optax.linear_schedule(peak, end, max(steps - warmup, 1))
    return optax.join_schedules([optax.linear_schedule(0, peak, warmup), rest], [warmup])


class DrawPrograms(NamedTuple):
    """What draws a batch: `to_devices` places weights, `init(key, first_sample)` draws x_T, and
    `advance(key, weights, labels, state, first_sample, steps) -> state` is a piece of the chain."""

    to_devices: Callable[[Any], Any]
    init: Callable[[PRNGKey, Any], SampleState]
    advance: Any
    arguments: tuple[Any, ...]
    """Shapes of those of `advance`, each with its place, but for `steps`."""


def draw_programs(
    run: DiffusionModel, chain: NoiseSchedule, sampler: Sampler, batch_size: int, mesh: Mesh
) -> DrawPrograms:
    """The reverse chain of `batch_size` samples at once, split over the mesh."""
    data, whole, shape = data_sharding(mesh), replicated(mesh), run.shape(batch_size)
    options: Any = {"sampler": sampler, "sharding": data}

    def init(key, first_sample):
        noise = partial(sample_noise, first_sample=first_sample, sharding=data, dtype=jnp.float32)
        x_T = noise(key, chain.num_timesteps, shape)
        return p_sample_init(None, chain, shape, x_T=x_T, **options)

    def advance(key, weights, labels, state, first_sample, steps):
        denoise_fn = guided_denoise_fn(run, weights, labels)
        own = {"first_sample": first_sample, **options, **run.policy}
        return p_sample_steps(key, chain, denoise_fn, state, steps, **own)

    key = jax.eval_shape(lambda: jax.random.key(0)).update(sharding=whole)
    number = jax.ShapeDtypeStruct((), jnp.int32, sharding=whole)
    labels = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=data)
    # What a rule remembers in the shape of the images is split as they are, the rest is whole.
    shapes = jax.eval_shape(init, key, number)
    states = jax.tree.map(lambda x: data if x.shape == shape else whole, shapes)
    start = jax.jit(init, out_shardings=states)
    to_devices = jax.jit(lambda weights: weights, out_shardings=whole)
    weights, state = jax.eval_shape(to_devices, run.variables), jax.eval_shape(start, key, number)
    arguments = (key, weights, None if run.num_classes is None else labels, state, number)
    places = jax.tree.map(lambda x: x.sharding, arguments)
    program = jax.jit(advance, static_argnums=5, in_shardings=places, out_shardings=states)
    return DrawPrograms(to_devices, start, program, arguments)


def pieces(chain: NoiseSchedule) -> list[int]:
    """The lengths of the pieces that a chain is drawn in, so that its progress can be shown."""
    starts = range(0, chain.num_timesteps, -(-chain.num_timesteps // 20))
    return [min(starts.step, chain.num_timesteps - start) for start in starts]


def guided_denoise_fn(run: DiffusionModel, weights: Any, labels: Any) -> Callable[[Any, Any], Any]:
    """The run's network under its guidance, for these labels if it knows any."""
    model: Any = run.model
    if labels is None:
        return partial(model.apply, weights)

    def of_class(labels):
        return lambda x_t, t: model.apply(weights, x_t, t, labels)

    if run.guidance == 1:
        return of_class(labels)
    null = of_class(labels * 0 + run.null_label)
    return classifier_free_guidance(of_class(labels), null, run.guidance)
