"""The loop of `jax-ddpm train`: batches in, steps, lines of metrics and checkpoints out.

host:    indices of k steps ─▶ each process loads its rows ─▶ one dispatch
devices: lax.scan over k training steps, the state donated
"""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_ddpm.cli.config import TrainConfig, UsageError
from jax_ddpm.cli.datasets import Dataset
from jax_ddpm.cli.interrupts import Interrupts
from jax_ddpm.cli.metrics import MetricsLog
from jax_ddpm.cli.programs import computing, training
from jax_ddpm.cli.resume import Place, begin
from jax_ddpm.cli.runs import Run
from jax_ddpm.cli.saving import Saver, read_state, steps_per_dispatch
from jax_ddpm.training import TrainState, batch_indices, init_train_state, load_batch
from jax_ddpm.training.hosts import any_process, on_writer
from jax_ddpm.training.sharding import data_sharding, replicated

__all__ = ["Fit", "fit"]


class Fit(NamedTuple):
    """Where a training ended: its state, after so many steps, and whether it was asked to stop."""

    state: TrainState
    step: int
    stopped: bool


def fit(
    config: TrainConfig,
    run: Run,
    data: Dataset,
    mesh: Mesh,
    place: Place,
    interrupts: Interrupts,
) -> Fit:
    """Train from the checkpoint in `place`, or from the start; what it ends with is saved there.

    Raises `UsageError` where a loss or gradient is not finite (unless `--on-nan skip`), where
    the checkpoint is another model's, and where nothing can be written.
    """
    run = computing(run, dtype=config.dtype, remat=config.remat)
    key = jax.random.fold_in(jax.random.key(config.seed), 0)
    data_key, train_key = jax.random.split(key)
    optimizer = _optimizer(config)
    train_step, placement = training(
        run,
        optimizer,
        mesh,
        ema_decay=_young(config.ema_decay),
        label_dropout=config.label_dropout,
        accumulate=config.accumulate,
        skip_nonfinite=True,
    )

    def init(params):
        return init_train_state(train_key, params, optimizer)

    variables = jax.device_get(run.pretrained.variables)
    done, pending = 0, {}
    if place.checkpoint is None:
        state = jax.jit(init, out_shardings=placement)(variables)
    else:
        done, pending = place.checkpoint.step, place.checkpoint.state["pending"]
        state = read_state(place.checkpoint, jax.eval_shape(init, variables))
        state = jax.jit(lambda state: state, out_shardings=placement)(state)

    dispatches = _dispatches(done, config)
    if dispatches:
        on_writer(lambda: begin(place))

    # One dispatch: a scan over the steps whose batches it is given.
    advance = jax.jit(
        lambda state, batches: lax.scan(train_step, state, batches),
        donate_argnums=0,
        out_shardings=(placement, replicated(mesh)),
    )

    @jax.jit
    def order(steps):
        return jax.vmap(
            lambda step: batch_indices(data_key, step, len(data.images), config.batch_size)
        )(steps)

    def batches(steps: range) -> Any:
        indices = np.asarray(order(np.arange(steps.start, steps.stop)))
        sharding = NamedSharding(mesh, P(None, *data_sharding(mesh).spec))
        images = load_batch(data.images, indices, sharding)
        if run.num_classes is None:
            return images
        assert data.labels is not None
        return images, load_batch(data.labels, indices, sharding)

    def check(step: int | None) -> None:
        if step is None or config.on_nan == "skip":
            return
        saver.wait()
        images = ", ".join(map(str, np.asarray(order(np.arange(step, step + 1)))[0]))
        good = "no checkpoint was saved yet"
        if saver.last is not None:
            good = f"the last good checkpoint is of step {saver.last:,}"
        raise UsageError(
            f"step {step + 1:,}: the loss or its gradient is not finite; {good}; a lower "
            "--learning-rate may help, --on-nan skip drops such steps; the step's images, some of "
            f"which may be at fault: {images}"
        )

    programs = {
        length: advance.lower(state, batches(range(length))).compile()
        for length in {len(steps) for steps in dispatches}
    }
    any_process(False)  # compiled at last everywhere: see `start_devices`
    metrics = MetricsLog(place.folder / "metrics.jsonl", config.steps, step=done, pending=pending)
    saver = Saver(place, config, mesh)
    with interrupts.held(), saver, metrics as log:
        for steps in dispatches:
            state, measured = programs[len(steps)](state, batches(steps))
            log.add(steps, measured)
            done = steps.stop
            due = done == config.steps or done % config.checkpoint_every == 0
            # Several processes agree to stop where they wait anyway.
            together = log.is_due or due or jax.process_count() == 1
            stop = together and any_process(interrupts.asked)
            if log.is_due or due or stop:
                check(log.collect())
            if log.is_due:
                log.write()
            if due or stop:
                saver.save(done, state, {"pending": log.pending})
            if stop:
                break
    return Fit(state, done, stopped=any_process(interrupts.asked))


def _dispatches(done: int, config: TrainConfig) -> list[range]:
    """The steps to go, cut also where checkpoints are due. The cuts are the same wherever a run
    resumes: a scan of another length may round otherwise."""
    cuts = {done, config.steps}
    for every in (steps_per_dispatch(config), config.checkpoint_every):
        cuts.update(range((done // every + 1) * every, config.steps, every))
    return [range(*pair) for pair in itertools.pairwise(sorted(cuts)) if done < config.steps]


def _optimizer(config: TrainConfig) -> optax.GradientTransformation:
    warmup = min(100, config.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, warmup, config.steps)
    return optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(rate))


def _young(decay: float) -> optax.Schedule:
    """A young average forgets fast, or a short run would sample its start."""
    return lambda step: jnp.minimum(decay, (1 + step) / (10 + step))
