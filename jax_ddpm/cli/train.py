"""`jax-ddpm train`: the main job, from images to a folder with weights and pictures."""

import json
import signal
import time
from functools import partial
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from jax_ddpm.cli.config import TrainConfig, UsageError, positive
from jax_ddpm.cli.datasets import load_images
from jax_ddpm.cli.draw import draw_samples
from jax_ddpm.cli.figures import save_forward, save_gif, save_grid, save_loss
from jax_ddpm.cli.runs import create_run, named_schedule, save_weights
from jax_ddpm.models import SimpleUNet
from jax_ddpm.samplers import ancestral
from jax_ddpm.schedule import NoiseSchedule
from jax_ddpm.training import TrainState, batch_indices, init_train_state, make_train_step
from jax_ddpm.training.sharding import data_mesh, data_sharding, replicated, use_cpu_cores

__all__ = ["train"]

_LOG_EVERY = 50


def train(config: TrainConfig) -> None:
    """Train as `config` says, write the run, and say what was written."""
    _check(config)
    use_cpu_cores(collectives=True)
    images = load_images(config.data)
    if config.batch_size > len(images):
        raise UsageError(
            f"--batch-size: expected at most {len(images)}, the number of images, "
            f"got {config.batch_size}"
        )
    schedule = named_schedule(config.schedule, config.timesteps)
    folder = create_run(config, images.shape[1:])
    print(
        f"{len(images):,} images of {'×'.join(map(str, images.shape[1:]))}, "
        f"{data_mesh(config.batch_size).size} {jax.default_backend()} device(s) → {folder}"
    )
    model = SimpleUNet(channels=images.shape[-1])
    state = _fit(config, folder, schedule, model, images)
    save_weights(folder, *jax.device_get((state.params, state.ema_params)))
    _draw(config, folder, schedule, model, state, images)
    _report(folder)


def _check(config: TrainConfig) -> None:
    positive(config, "steps", "batch_size", "learning_rate", "timesteps", "grad_clip")
    if config.timesteps < 2:
        raise UsageError(f"--timesteps: expected at least 2, got {config.timesteps}")
    if not 0 <= config.ema_decay < 1:
        raise UsageError(f"--ema-decay: expected 0 to 1, below 1, got {config.ema_decay}")
    if not config.name or Path(config.name).name != config.name:
        raise UsageError(f"--name: expected the name of a folder, got {config.name!r}")


def _fit(
    config: TrainConfig,
    folder: Path,
    schedule: NoiseSchedule,
    model: SimpleUNet,
    images: np.ndarray,
) -> TrainState:
    """Train; Ctrl-C ends it early with what there is."""
    mesh = data_mesh(config.batch_size)
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.grad_clip),
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.steps)),
    )
    init_key, data_key, train_key = jax.random.split(jax.random.key(config.seed), 3)
    variables = model.init(init_key, images[:1], jnp.zeros((1,), jnp.int32))
    state = init_train_state(train_key, variables, optimizer)
    state = jax.device_put(state, replicated(mesh))
    dataset = jax.device_put(images, replicated(mesh))

    def ema_decay(step):  # a young average forgets fast, or a short run would sample its start
        return jnp.minimum(config.ema_decay, (1 + step) / (10 + step))

    train_step = make_train_step(schedule, model.apply, optimizer, ema_decay=ema_decay)

    @partial(jax.jit, donate_argnums=0)
    def step(state, dataset):
        indices = batch_indices(data_key, state.step, len(images), config.batch_size)
        batch = lax.with_sharding_constraint(dataset[indices], data_sharding(mesh))
        return train_step(state, batch)

    with (
        (folder / "metrics.jsonl").open("w") as log,
        tqdm(total=config.steps, desc="training", unit="step") as progress,
    ):
        recent, since = [], time.perf_counter()
        # An exception inside a step would leave its donated state deleted: a flag does not.
        stopped = []
        previous = signal.signal(signal.SIGINT, lambda *_: stopped.append(True))
        try:
            for number in range(1, config.steps + 1):
                state, metrics = step(state, dataset)
                recent.append(metrics)
                if number % _LOG_EVERY == 0 or number == config.steps:
                    since = _log(log, progress, number, recent, since)
                    recent = []
                if stopped:
                    progress.write(f"stopped at step {number:,}")
                    break
        finally:
            signal.signal(signal.SIGINT, previous)
    return state


def _log(log: TextIO, progress: tqdm, number: int, recent: list[dict], since: float) -> float:
    metrics = jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(recent))
    now = time.perf_counter()
    line = {"step": number, **metrics, "steps_per_second": round(len(recent) / (now - since), 2)}
    log.write(json.dumps(line) + "\n")
    log.flush()
    progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
    progress.update(len(recent))
    return now


def _draw(
    config: TrainConfig,
    folder: Path,
    schedule: NoiseSchedule,
    model: SimpleUNet,
    state: TrainState,
    images: np.ndarray,
) -> None:
    frames = []
    samples = draw_samples(
        jax.random.fold_in(jax.random.key(config.seed), 1),
        schedule,
        model.apply,
        state.ema_params,
        64,
        images.shape[1:],
        ancestral(),
        watch=lambda x_t: frames.append(x_t[:16]),
    )
    save_grid(folder / "samples.png", samples)
    save_gif(folder / "reverse.gif", frames)
    save_forward(folder / "forward.png", schedule, images[0])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    if lines:
        save_loss(
            folder / "loss.png", [line["step"] for line in lines], [line["loss"] for line in lines]
        )


_CONTENTS = {
    "config.json": "what was run",
    "metrics.jsonl": "loss, gradient norm and speed, every 50 steps",
    "params.safetensors": "the weights",
    "ema.safetensors": "their average, which samples are drawn from",
    "loss.png": "the loss against the step",
    "forward.png": "an image turning into noise",
    "samples.png": "64 generated images",
    "reverse.gif": "noise turning into 16 of them",
}


def _report(folder: Path) -> None:
    print(f"\nwrote {folder}/")
    for name, content in _CONTENTS.items():
        if (folder / name).exists():
            print(f"  {name:<20}{content}")
    print(f"\nnext: jax-ddpm sample --run {folder} --num 64 --out samples.png")
