"""`jax-ddpm train`: the main job, from images to a folder with weights and pictures."""

import hashlib
import json
import os
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm.cli.config import DevicesConfig, TrainConfig, UsageError, naming, positive, writing
from jax_ddpm.cli.datasets import Dataset, load_dataset
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.draw import class_columns, cycle_labels, draw_samples
from jax_ddpm.cli.figures import save_forward, save_gif, save_grid, save_loss
from jax_ddpm.cli.fit import fit
from jax_ddpm.cli.interrupts import STOPPED, Interrupts
from jax_ddpm.cli.metrics import damaged_lines, read_metrics
from jax_ddpm.cli.programs import computing
from jax_ddpm.cli.resume import locked, open_run, what_is_saved
from jax_ddpm.cli.runs import (
    PICTURES,
    Run,
    describe,
    init_variables,
    load_model,
    named_schedule,
)
from jax_ddpm.cli.saving import computed_by
from jax_ddpm.interop import Pretrained
from jax_ddpm.io.arrays import flatten, to_bytes
from jax_ddpm.io.checkpoint import Checkpoint
from jax_ddpm.models import SimpleUNet, UNet, ddpm_digits
from jax_ddpm.samplers import ancestral
from jax_ddpm.training.hosts import (
    any_process,
    is_writer,
    same_everywhere,
    to_hosts,
    together,
)
from jax_ddpm.training.sharding import device_mesh

__all__ = ["train"]

_PICTURE_STEPS = 200


def train(config: TrainConfig, interrupts: Interrupts) -> None:
    """Train as `config` says, write the run, and say what was written.

    Stopped, it ends with the exit code `STOPPED`, and resumes when it is called again.
    """
    _check(config)
    start_devices(config.devices)
    folder = config.out / (config.name or (config.data or Path(config.dataset)).stem)
    if is_writer():
        interrupts.saved = lambda: what_is_saved(folder)
    data, run, mesh = together(lambda: _prepare(config))
    images = data.describe()
    _agree(config, run, images)
    with ExitStack() as stack:
        together(lambda: stack.enter_context(locked(folder)) if is_writer() else None)
        place = open_run(folder, config, run, images)
        say(_summary(data, run, mesh, folder))
        if place.checkpoint is not None:
            say(_resuming(place.checkpoint, config, mesh))
            done = place.checkpoint.step >= config.steps
            if any_process(done and is_writer() and _is_whole(folder)):
                say(_next(folder))
                return
        end = fit(config, run, data, mesh, place, interrupts)
        if end.stopped:
            say(f"stopped at step {end.step:,} and saved: the same command resumes")
            sys.exit(STOPPED)
        _draw(config, folder, run, to_hosts(end.state.ema_params, mesh), data)
        if is_writer():
            _report(config, folder, class_columns(run) is not None)


def _prepare(config: TrainConfig) -> tuple[Dataset, Run, Mesh]:
    data = load_dataset(config)
    if config.batch_size > len(data.images):
        raise UsageError(
            f"--batch-size: expected at most {len(data.images)}, the number of images, "
            f"got {config.batch_size}"
        )
    run = _start(config, data)
    computing(run, dtype=config.dtype, remat=config.remat)  # refuses what does not go together
    return data, run, _mesh(config)


def _agree(config: TrainConfig, run: Run, images: dict[str, Any]) -> None:
    """Raises `UsageError` where processes were told, or have read, different things."""
    if jax.process_count() == 1:
        return
    if not same_everywhere(json.dumps(images)):
        raise UsageError("--data: expected the same images in every process")
    if not same_everywhere(repr(replace(config, devices=DevicesConfig(), data=None, out=Path()))):
        raise UsageError("expected the same flags in every process")
    weights = to_bytes(flatten(jax.device_get(run.pretrained.variables)))
    if not same_everywhere(json.dumps([describe(run), hashlib.sha256(weights).hexdigest()])):
        raise UsageError("--init: expected the same model in every process")


def _summary(data: Dataset, run: Run, mesh: Mesh, folder: Path) -> str:
    count, *image_shape = data.images.shape
    classes = f" in {run.num_classes} classes" if run.num_classes else ""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.pretrained.variables))
    idle = jax.device_count() - mesh.size
    left_out = f" ({idle} more do not divide the batch)" if idle else ""
    return (
        f"{count:,} images of {'×'.join(map(str, image_shape))}{classes}, {parameters:,} "
        f"parameters, {mesh.size} {jax.default_backend()} device(s){left_out} → {folder}"
    )


def _resuming(checkpoint: Checkpoint, config: TrainConfig, mesh: Mesh) -> str:
    """From where, and whether what comes is what would have come."""
    if checkpoint.step >= config.steps:
        return f"trained to step {checkpoint.step:,} already"
    line = f"resuming from step {checkpoint.step:,}"
    before, now = checkpoint.state["computed_by"], computed_by(config, mesh)
    if before != now:
        line += f", trained by {before}, now by {now}: the same within rounding, not to the bit"
    return line


def _check(config: TrainConfig) -> None:
    positive(config, "steps", "batch_size", "learning_rate", "timesteps", "grad_clip")
    positive(config, "accumulate", "fsdp", "steps_per_dispatch")
    positive(config, "checkpoint_every", "keep", "keep_every")
    if (config.keep_every or 0) % config.checkpoint_every:
        raise UsageError(
            f"--keep-every: expected a multiple of --checkpoint-every {config.checkpoint_every}, "
            f"got {config.keep_every}"
        )
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


def _draw(config: TrainConfig, folder: Path, run: Run, ema_params: Any, data: Dataset) -> None:
    run = run._replace(pretrained=run.pretrained._replace(variables=ema_params))
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
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if line["loss"] is not None]
    steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
    with (
        writing("--out", folder),
        tempfile.TemporaryDirectory(prefix=".pictures", dir=folder) as new,
    ):
        save_grid(Path(new, "samples.png"), samples, columns)
        save_gif(Path(new, "reverse.gif"), frames, columns)
        save_forward(Path(new, "forward.png"), run.pretrained.schedule, data.images[0])
        save_loss(Path(new, "loss.png"), steps, losses)
        for name in PICTURES:
            os.replace(Path(new, name), folder / name)


_CONTENTS = {
    "config.json": "what was run",
    "metrics.jsonl": "loss, gradient norm and speed, every 50 steps",
    "checkpoints": "weights, their average, the optimizer: all that is needed to resume",
    "loss.png": "the loss against the step",
    "forward.png": "an image, and the tutorial's square, turning into noise",
    "samples.png": "generated images",
    "reverse.gif": "noise turning into the first of them",
}


def _is_whole(folder: Path) -> bool:
    there = all((folder / name).exists() for name in _CONTENTS)
    return there and not damaged_lines(folder / "metrics.jsonl")


def _report(config: TrainConfig, folder: Path, in_columns: bool) -> None:
    print(f"\nwrote {folder}/")
    for name, content in _CONTENTS.items():
        sorted_by = ", one class in each column" if name == "samples.png" and in_columns else ""
        print(f"  {name:<16}{content}{sorted_by}")
    dropped = sum(line.get("dropped", 0) for line in read_metrics(folder / "metrics.jsonl"))
    if dropped:
        print(
            f"\n{dropped:,} of {config.steps:,} steps dropped: "
            "their loss or gradient was not finite"
        )
    print("\n" + _next(folder))


def _next(folder: Path) -> str:
    return f"next: jax-ddpm sample --run {folder} --num 64 --out samples.png"
