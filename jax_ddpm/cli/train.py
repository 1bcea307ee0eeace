"""`jax-ddpm train`: the main job, from images to a folder with weights and pictures."""

import json
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from tqdm import tqdm

from jax_ddpm.cli.config import TrainConfig, UsageError, naming, positive
from jax_ddpm.cli.datasets import Dataset, load_dataset
from jax_ddpm.cli.draw import class_columns, cycle_labels, draw_samples
from jax_ddpm.cli.figures import save_forward, save_gif, save_grid, save_loss
from jax_ddpm.cli.runs import (
    Run,
    create_run,
    init_variables,
    load_model,
    named_schedule,
    save_weights,
)
from jax_ddpm.interop import Pretrained
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.samplers import ancestral
from jax_ddpm.training import TrainState, batch_indices, init_train_state, make_train_step
from jax_ddpm.training.sharding import data_mesh, data_sharding, replicated, use_cpu_cores

__all__ = ["train"]

_LOG_EVERY = 50
_PICTURE_STEPS = 200


def train(config: TrainConfig) -> None:
    """Train as `config` says, write the run, and say what was written."""
    _check(config)
    use_cpu_cores(collectives=True)
    data = load_dataset(config)
    count, *image_shape = data.images.shape
    run = _start(config, data)
    if config.batch_size > count:
        raise UsageError(
            f"--batch-size: expected at most {count}, the number of images, got {config.batch_size}"
        )
    folder = config.out / (config.name or (config.data or Path(config.dataset)).stem)
    create_run(folder, run, config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.pretrained.variables))
    classes = f" in {run.num_classes} classes" if run.num_classes else ""
    print(
        f"{count:,} images of {'×'.join(map(str, image_shape))}{classes}, {parameters:,} "
        f"parameters, {data_mesh(config.batch_size).size} {jax.default_backend()} device(s) "
        f"→ {folder}"
    )
    state = _fit(config, folder, run, data)
    save_weights(folder, *jax.device_get((state.params, state.ema_params)))
    trained = run.pretrained._replace(variables=state.ema_params)
    _draw(config, folder, run._replace(pretrained=trained), data)
    _report(folder)


def _check(config: TrainConfig) -> None:
    positive(config, "steps", "batch_size", "learning_rate", "timesteps", "grad_clip")
    if config.timesteps < 2:
        raise UsageError(f"--timesteps: expected at least 2, got {config.timesteps}")
    if not 0 <= config.ema_decay < 1:
        raise UsageError(f"--ema-decay: expected 0 to 1, below 1, got {config.ema_decay}")
    if not 0 <= config.label_dropout <= 1:
        raise UsageError(f"--label-dropout: expected 0 to 1, got {config.label_dropout}")
    if config.name is not None and (not config.name or Path(config.name).name != config.name):
        raise UsageError(f"--name: expected the name of a folder, got {config.name!r}")


def _start(config: TrainConfig, data: Dataset) -> Run:
    """The model before the first step: new, or that of `--init`."""
    image_shape = tuple(data.images.shape[1:])
    if config.init is not None:
        for name in ("model", "schedule", "timesteps", "prediction_type"):
            if getattr(config, name) != getattr(TrainConfig, name):
                raise UsageError(f"--{name.replace('_', '-')}: comes with --init")
        with naming("--init"):
            run = load_model(config.init)
        # Sixteen bits hold a network, but not the small steps that train it.
        variables = jax.tree.map(lambda x: np.asarray(x, np.float32), run.pretrained.variables)
        run = run._replace(pretrained=run.pretrained._replace(variables=variables))
        if run.image_shape != image_shape:
            raise UsageError(
                f"--init: expected images of {run.image_shape}, as its network, got {image_shape}"
            )
        if run.num_classes is None:
            return run
        if data.num_classes is None or data.num_classes > run.num_classes:
            raise UsageError(
                f"--init: its network has {run.num_classes} classes, the images "
                f"{data.num_classes or 'none'}"
            )
        if run.null_label is not None and data.num_classes > run.null_label:
            # A checkpoint whose every label is a class: none is left to stand for no class.
            return run._replace(null_label=None, guidance=1.0)
        return run._replace(num_classes=data.num_classes, guidance=config.guidance)
    model = _new_model(config, data)
    with naming("--data"):
        variables = init_variables(model, jax.random.key(config.seed), image_shape)
    pretrained = Pretrained(
        model,
        variables,
        named_schedule(config.schedule, config.timesteps),
        prediction_type=config.prediction_type,
        timestep_spacing="trailing",
    )
    labelled = isinstance(model, UNet)
    classes = data.num_classes if labelled else None
    return Run(pretrained, image_shape, classes, null_label=classes, guidance=config.guidance)


def _new_model(config: TrainConfig, data: Dataset) -> UNet | SimpleUNet:
    height, width, channels = data.images.shape[1:]
    if config.model == "simple":
        return SimpleUNet(channels=channels)
    # One more level for every doubling from 32 pixels on; attention at the lowest.
    levels = 2
    while (
        levels < 4
        and min(height, width) >= 2 ** (levels + 3)
        and not (height % 2**levels or width % 2**levels)
    ):
        levels += 1
    return ddpm_digits(
        data.num_classes,
        sample_size=(height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(32, *(64,) * (levels - 1)),
        down_block_types=(*("DownBlock2D",) * (levels - 1), "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *("UpBlock2D",) * (levels - 1)),
    )


def _fit(config: TrainConfig, folder: Path, run: Run, data: Dataset) -> TrainState:
    """Train; Ctrl-C ends it early with what there is."""
    mesh = data_mesh(config.batch_size)
    warmup = min(100, config.steps // 10)
    rate = optax.warmup_cosine_decay_schedule(0, config.learning_rate, warmup, config.steps)
    optimizer = optax.chain(optax.clip_by_global_norm(config.grad_clip), optax.adam(rate))
    data_key, train_key = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 0))
    state = init_train_state(train_key, run.pretrained.variables, optimizer)
    state = jax.device_put(state, replicated(mesh))
    arrays = (data.images,) if run.num_classes is None else (data.images, data.labels)
    arrays = jax.device_put(arrays, replicated(mesh))
    train_step = _train_step(config, run, optimizer)

    @partial(jax.jit, donate_argnums=0)
    def step(state, arrays):
        indices = batch_indices(data_key, state.step, len(data.images), config.batch_size)
        batch = tuple(
            lax.with_sharding_constraint(array[indices], data_sharding(mesh)) for array in arrays
        )
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
                state, metrics = step(state, arrays)
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


def _train_step(config: TrainConfig, run: Run, optimizer: Any) -> Callable:
    model: Any = run.pretrained.model

    def ema_decay(step):  # a young average forgets fast, or a short run would sample its start
        return jnp.minimum(config.ema_decay, (1 + step) / (10 + step))

    return make_train_step(
        run.pretrained.schedule,
        model.apply,
        optimizer,
        ema_decay=ema_decay,
        prediction_type=run.pretrained.prediction_type,
        variance_type=run.pretrained.variance_type,
        loss_type="hybrid" if run.pretrained.variance_type.startswith("learned") else "mse",
        null_label=run.null_label,
        label_dropout=config.label_dropout,
        dropout=isinstance(model, UNet) and model.dropout > 0,
    )


def _log(log: TextIO, progress: tqdm, number: int, recent: list[dict], since: float) -> float:
    metrics = jax.tree.map(lambda *values: float(np.mean(values)), *jax.device_get(recent))
    now = time.perf_counter()
    line = {"step": number, **metrics, "steps_per_second": round(len(recent) / (now - since), 2)}
    log.write(json.dumps(line) + "\n")
    log.flush()
    progress.set_postfix(loss=f"{metrics['loss']:.4f}", refresh=False)
    progress.update(len(recent))
    return now


def _draw(config: TrainConfig, folder: Path, run: Run, data: Dataset) -> None:
    frames = []
    columns = class_columns(run) or 8
    chain = run.pretrained.schedule
    if chain.num_timesteps > _PICTURE_STEPS:
        chain = run.pretrained.chain(_PICTURE_STEPS)
    samples = draw_samples(
        jax.random.fold_in(jax.random.key(config.seed), 1),
        run,
        chain,
        8 * columns,
        ancestral(),
        labels=cycle_labels(run, 8 * columns),
        watch=lambda x_t: frames.append(x_t[: 2 * columns]),
    )
    save_grid(folder / "samples.png", samples, columns)
    save_gif(folder / "reverse.gif", frames, columns)
    save_forward(folder / "forward.png", run.pretrained.schedule, data.images[0])
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
    "samples.png": "generated images, a class a column",
    "reverse.gif": "noise turning into the first of them",
}


def _report(folder: Path) -> None:
    print(f"\nwrote {folder}/")
    for name, content in _CONTENTS.items():
        if (folder / name).exists():
            print(f"  {name:<20}{content}")
    print(f"\nnext: jax-ddpm sample --run {folder} --num 64 --out samples.png")
