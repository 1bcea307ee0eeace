"""`jax-ddpm train`: from images to a folder with weights and pictures."""

import sys
from dataclasses import replace
from pathlib import Path

from jax_ddpm._errors import FieldError
from jax_ddpm.cli.common import load_images, say, start_devices
from jax_ddpm.cli.config import TrainConfig
from jax_ddpm.cli.errors import UsageError, naming
from jax_ddpm.cli.terminal import STOPPED, Interrupts, bars
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.io.checkpoint import list_checkpoints
from jax_ddpm.runs import Progress, load_model
from jax_ddpm.runs.callbacks import TRAINING_GIF, best_line
from jax_ddpm.runs.figures import class_columns, save_pictures
from jax_ddpm.runs.metrics import read_metrics
from jax_ddpm.runs.model import CHECKPOINTS, FILES, METRICS, is_run
from jax_ddpm.runs.training import Training, open_run
from jax_ddpm.runs.training import train as run_training
from jax_ddpm.training.hosts import any_process, is_writer, run_on_all

_NEXT = "next: jax-ddpm sample {} --num 64 --out samples.png"


def train(config: TrainConfig, interrupts: Interrupts) -> None:
    """Train as `config` says, write the run, and say what was written.

    Stopped, it ends with the exit code `STOPPED`, and resumes when it is called again.
    """
    settings, folder = config.settings, config.folder
    start_devices(config.devices)
    if is_writer():
        interrupts.saved = lambda: _saved(folder)
    with naming(folder="--init"):
        data = run_on_all(lambda: _images(config))
    if isinstance(source := config.data.source, Path):  # where `evaluate` finds them again
        data = replace(data, source=str(source.absolute()))
    ways = {"accept_changes": config.run.accept_changes, "overwrite": config.run.overwrite}
    opened = open_run(folder, data, settings, **ways)
    try:
        with naming(folder="--name", images="samples"), opened as training:
            say(training.summary())
            whole = all((folder / name).exists() for name in FILES)
            if any_process(whole and is_writer() and training.step >= settings.steps):
                say(_NEXT.format(folder))
                return
            with bars() as show:

                def progress(here: Progress) -> None:
                    # From the first step on a signal waits until that is saved.
                    interrupts.busy = here.what == "training"
                    show(here) if interrupts.busy else say(str(here))

                try:
                    end = run_training(training, progress, lambda: interrupts.asked)
                finally:
                    interrupts.busy = False
            if any_process(interrupts.asked):
                say(f"stopped at step {end.step:,} and saved: the same command resumes")
                sys.exit(STOPPED)
            with bars() as show:
                save_pictures(folder, end.run, data, seed=settings.seed, progress=show)
    except OSError as error:
        named = Path(error.filename or folder)
        if isinstance(error, ConnectionError) or config.run.out not in (named, *named.parents):
            raise
        problem = f"cannot write {error.filename or folder}: {error.strerror or error}"
        raise UsageError(f"--out: {problem}; {_saved(folder)}") from None
    if is_writer():
        _report(training)


def _images(config: TrainConfig) -> Dataset:
    """The images; flags that are not given are those of the run in `--init`."""
    given, init = config.images, config.model.init
    if init is not None and is_run(init):
        unsaid = vars(Preparation())
        flags = {name: value for name, value in vars(given).items() if value != unsaid[name]}
        given = replace(Preparation(**load_model(init).preparation), **flags)
    try:
        return load_images(config.data, given)
    except FieldError as error:
        if config.data.data is not None or error.field is None:
            raise
        recipe = config.run.recipe
        flag = f"--recipe {recipe}" if recipe else f"--{error.field.replace('_', '-')}"
        images = f"not for the images of {config.data.source}; --data takes images of your own"
        raise UsageError(f"{flag}: {images}") from None


def _saved(folder: Path) -> str:
    """From where the command that trains this run would resume, for its last line."""
    paths = list_checkpoints(folder / CHECKPOINTS)
    if not paths:
        return "nothing was saved yet"
    return f"step {int(paths[-1].name):,} is saved: the same command resumes from there"


def _report(training: Training) -> None:
    folder, contents, lines = training.folder, dict(FILES), read_metrics(training.folder / METRICS)
    if class_columns(training.run)[0]:
        contents["samples.png"] += ", one class in each column"
    if (folder / TRAINING_GIF).exists():
        contents["samples/"] = f"samples on the way; {TRAINING_GIF} shows them one after the other"
    print(f"\nwrote {folder}/")
    for name, content in contents.items():
        print(f"  {name:<16}{content}")
    if dropped := sum(line.get("dropped", 0) for line in lines):
        what = f"{dropped:,} of {training.settings.steps:,} steps dropped"
        print(f"\n{what}: their loss or gradient was not finite")
    if found := best_line(lines):
        best, name = found
        here = (folder / CHECKPOINTS / f"{best['step']:08d}").exists()
        kept = f"--checkpoint {best['step']}" if here else "its checkpoint is gone"
        print(f"\nbest: step {best['step']:,}, {name} {best[name]:.4g} ({kept})")
    print("\n" + _NEXT.format(folder))
