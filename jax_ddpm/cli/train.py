"""`jax-ddpm train`: the main job, from images to a folder with weights and pictures."""

import json
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm.cli.config import TrainConfig, UsageError, naming, positive
from jax_ddpm.cli.datasets import Dataset, load_dataset
from jax_ddpm.cli.devices import start_devices
from jax_ddpm.cli.draw import class_columns, cycle_labels, draw_samples
from jax_ddpm.cli.figures import save_forward, save_gif, save_grid, save_loss
from jax_ddpm.cli.fit import fit
from jax_ddpm.cli.programs import computing
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
from jax_ddpm.training.hosts import is_writer, on_writer, to_hosts
from jax_ddpm.training.sharding import device_mesh

__all__ = ["train"]

_PICTURE_STEPS = 200


def train(config: TrainConfig) -> None:
    """Train as `config` says, write the run, and say what was written."""
    _check(config)
    start_devices(config.devices, collectives=True)
    data = load_dataset(config)
    count, *image_shape = data.images.shape
    run = _start(config, data)
    computed = computing(run, dtype=config.dtype, remat=config.remat)
    if config.batch_size > count:
        raise UsageError(
            f"--batch-size: expected at most {count}, the number of images, got {config.batch_size}"
        )
    folder = config.out / (config.name or (config.data or Path(config.dataset)).stem)
    mesh = _mesh(config)
    on_writer(lambda: create_run(folder, run, config))
    if is_writer():
        parameters = sum(leaf.size for leaf in jax.tree.leaves(run.pretrained.variables))
        classes = f" in {run.num_classes} classes" if run.num_classes else ""
        print(
            f"{count:,} images of {'×'.join(map(str, image_shape))}{classes}, {parameters:,} "
            f"parameters, {mesh.size} {jax.default_backend()} device(s) → {folder}"
        )
    state = fit(config, folder, computed, data, mesh)
    params, ema_params = to_hosts((state.params, state.ema_params), mesh)
    on_writer(lambda: save_weights(folder, params, ema_params))
    trained = run.pretrained._replace(variables=ema_params)
    _draw(config, folder, run._replace(pretrained=trained), data)
    if is_writer():
        _report(folder)


def _check(config: TrainConfig) -> None:
    positive(config, "steps", "batch_size", "learning_rate", "timesteps", "grad_clip")
    positive(config, "accumulate", "fsdp", "steps_per_dispatch")
    if config.batch_size % config.accumulate:
        raise UsageError(
            f"--accumulate: expected a divisor of --batch-size {config.batch_size}, "
            f"got {config.accumulate}"
        )
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


def _mesh(config: TrainConfig) -> Mesh:
    """All devices that share a part of the batch evenly."""
    try:
        return device_mesh(config.batch_size // config.accumulate, fsdp=config.fsdp)
    except ValueError as error:
        name, _, problem = str(error).partition(": ")
        raise UsageError(f"--{name.replace('_', '-')}: {problem}") from None


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
    if not is_writer():
        return
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
