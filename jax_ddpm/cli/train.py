"""`jax-ddpm train`: from images to a folder with weights and pictures."""

import sys
from contextlib import ExitStack
from pathlib import Path

import jax

from jax_ddpm.cli.config import TrainConfig
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.errors import UsageError, naming
from jax_ddpm.cli.interrupts import STOPPED, Interrupts
from jax_ddpm.cli.progress import Bar
from jax_ddpm.data import load_dataset
from jax_ddpm.io.checkpoint import list_checkpoints
from jax_ddpm.runs import Fit, Progress
from jax_ddpm.runs.fitting import train as run_training
from jax_ddpm.runs.metrics import damaged_lines, read_metrics
from jax_ddpm.runs.pictures import save_pictures
from jax_ddpm.runs.resuming import Training, open_run
from jax_ddpm.runs.run import CHECKPOINTS, CONFIG, METRICS
from jax_ddpm.training.hosts import any_process, is_writer, together

__all__ = ["train"]

_CONTENTS = {
    CONFIG: "what was run",
    METRICS: "loss, gradient norm and speed, every 50 steps",
    CHECKPOINTS: "weights, their average, the optimizer: all that is needed to resume",
    "loss.png": "the loss against the step",
    "forward.png": "an image, and the tutorial's square, turning into noise",
    "samples.png": "generated images",
    "reverse.gif": "noise turning into the first of them",
}


def train(config: TrainConfig, interrupts: Interrupts) -> None:
    """Train as `config` says, write the run, and say what was written.

    Stopped, it ends with the exit code `STOPPED`, and resumes when it is called again.
    """
    settings, folder = config.settings, config.folder
    start_devices(config.devices)
    if is_writer():
        interrupts.saved = lambda: _saved(folder)
    data = together(lambda: load_dataset(config.data.data or config.data.dataset))
    opened = open_run(folder, data, settings, accept_changes=config.run.accept_changes)
    try:
        with naming(folder="--name"), opened as training:
            _say_what_was_found(training)
            done = training.step >= settings.steps
            if any_process(done and is_writer() and _is_whole(folder)):
                say(_next(folder))
                return
            end = _run(training, interrupts)
            if any_process(interrupts.asked):
                say(f"stopped at step {end.step:,} and saved: the same command resumes")
                sys.exit(STOPPED)
            with Bar("sampling") as bar:
                save_pictures(folder, end.run, data, seed=settings.seed, progress=bar)
    except OSError as error:
        problem = f"cannot write {error.filename or folder}: {error.strerror or error}"
        raise UsageError(f"--out: {problem}; {_saved(folder)}") from None
    if is_writer():
        _report(training)


def _say_what_was_found(training: Training) -> None:
    count, *image_shape = training.data.images.shape
    run, size = training.run, training.mesh.size
    classes = f" in {run.num_classes} classes" if run.num_classes else ""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.pretrained.variables))
    idle = jax.device_count() - size
    left_out = f" ({idle} more do not divide the batch)" if idle else ""
    if training.changes:
        changes = (f"--{field.replace('_', '-')}: {what}" for field, what in training.changes)
        say(f"accepted: {'; '.join(changes)}")
    for path, problem in training.damaged.items():
        say(f"{problem}; set aside as {path.name}")
    say(
        f"{count:,} images of {'×'.join(map(str, image_shape))}{classes}, {parameters:,} "
        f"parameters, {size} {jax.default_backend()} device(s){left_out} → {training.folder}"
    )
    if training.checkpoint is None:
        return
    if training.step >= training.settings.steps:
        say(f"trained to step {training.step:,} already")
        return
    line = f"resuming from step {training.step:,}"
    before, now = training.checkpoint.state["computed_by"], training.computed_by
    if before != now:
        line += f", trained by {before}, now by {now}: the same within rounding, not to the bit"
    say(line)


def _run(training: Training, interrupts: Interrupts) -> Fit:
    """Train under a bar; from the first step on a signal waits until that is saved."""
    with ExitStack() as held, Bar("training") as bar:

        def progress(here: Progress) -> bool:
            if here.done == training.step:
                held.enter_context(interrupts.held())
                bar(here)
            elif here.line is not None:  # otherwise the devices may not be there yet
                bar(here)
            return interrupts.asked

        return run_training(training, progress)


def _saved(folder: Path) -> str:
    """From where the command that trains this run would resume, for its last line."""
    paths = list_checkpoints(folder / CHECKPOINTS)
    if not paths:
        return "nothing was saved yet"
    return f"step {int(paths[-1].name):,} is saved: the same command resumes from there"


def _is_whole(folder: Path) -> bool:
    there = all((folder / name).exists() for name in _CONTENTS)
    return there and not damaged_lines(folder / METRICS)


def _report(training: Training) -> None:
    folder, in_columns = training.folder, training.run.class_columns is not None
    print(f"\nwrote {folder}/")
    for name, content in _CONTENTS.items():
        sorted_by = ", one class in each column" if name == "samples.png" and in_columns else ""
        print(f"  {name:<16}{content}{sorted_by}")
    if dropped := sum(line.get("dropped", 0) for line in read_metrics(folder / METRICS)):
        what = f"{dropped:,} of {training.settings.steps:,} steps dropped"
        print(f"\n{what}: their loss or gradient was not finite")
    print("\n" + _next(folder))


def _next(folder: Path) -> str:
    return f"next: jax-ddpm sample --run {folder} --num 64 --out samples.png"
