"""`jax-ddpm evaluate`: figures for a model or for samples, from real images."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jax_ddpm._errors import FieldError
from jax_ddpm.cli.chain import load_chain, make_sampler
from jax_ddpm.cli.config import ChainConfig, DataConfig, EvaluateConfig
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.cli.images import load_images
from jax_ddpm.cli.progress import bars
from jax_ddpm.cli.report import report
from jax_ddpm.data import DATASETS, Dataset, Preparation
from jax_ddpm.data.hub import HUB
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import read_json, write_json
from jax_ddpm.runs import evaluate as measure
from jax_ddpm.runs import evaluate_samples
from jax_ddpm.runs.model import CHECKPOINTS, CONFIG
from jax_ddpm.runs.samples import kept_samples, open_samples
from jax_ddpm.training.hosts import run_on_all, run_on_writer

_OF_IMAGES = ("data", "image_size", "channels")


def evaluate(config: EvaluateConfig) -> None:
    """Measure as `config` says, and print."""
    check_file("--json", config.json)
    check_file("--save-statistics", config.save_statistics, ".npz")
    if config.reference == "data":
        config = replace(config, data=_images_of_run(config))
    elif config.data.dataset is not None:
        raise UsageError("--dataset: cannot be given with --reference; --data can")
    options = {
        "seed": config.seed,
        "inception": config.inception,
        "reference": None if config.reference == "data" else config.reference,
        "statistics": config.save_statistics,
        "agreement": config.agreement,
    }
    data = "--data" if config.data.data else "--dataset"
    with naming(data=data, folder="--out", statistics="--save-statistics", images="samples"):
        if config.samples is not None:
            figures = _of_samples(config, options)
        else:
            figures = _of_model(config, options)
    for line in report(figures):
        say(line)
    if (path := config.json) is not None:
        with writing("--json", path):
            source = str(config.samples or config.run or config.pretrained)
            figures = {"samples" if config.samples else "run": source, **figures}
            run_on_writer(lambda: write_json(path, figures))


def _of_model(config: EvaluateConfig, options: dict[str, Any]) -> dict[str, Any]:
    if config.run is None and config.pretrained is None:
        raise UsageError("expected --run, --pretrained or --samples, and one of them only")
    sampler = make_sampler(config)
    start_devices(config.devices)
    if config.out is not None and (found := kept_samples(config.out)):
        say(f"{found:,} samples are in {config.out} already")
    run, data = run_on_all(lambda: _prepare(config))
    for note in data.notes if data else ():
        say(note)
    with bars() as show:
        return measure(
            *(run, data),
            num=1000 if config.num is None else config.num,
            steps=config.steps,
            sampler=sampler,
            batch_size=config.batch_size,
            folder=config.out,
            num_scored=config.num_scored,
            progress=show,
            **options,
        )


def _of_samples(config: EvaluateConfig, options: dict[str, Any]) -> dict[str, Any]:
    assert config.samples is not None
    for name in (*(field.name for field in fields(ChainConfig)), "out", "num_scored", "batch_size"):
        if getattr(config, name) != getattr(EvaluateConfig, name):
            raise UsageError(f"--{name.replace('_', '-')}: cannot be given with --samples")
    start_devices(config.devices)
    try:
        data = run_on_all(lambda: _real_images(config))
        for note in data.notes if data else ():
            say(note)
        with bars() as show:
            options |= {"num": config.num, "range": config.range}
            return evaluate_samples(config.samples, data, progress=show, **options)
    except FieldError as error:
        if error.field in _OF_IMAGES and config.data.data is None:
            problem = f"{config.data.source} cannot be prepared as the samples are"
            raise UsageError(f"--dataset: {problem}; --data says where real images are") from None
        raise


def _real_images(config: EvaluateConfig) -> Dataset | None:
    """Brought to the samples' size and channels."""
    if not _wants_images(config):
        return None
    assert config.samples is not None
    height, width, channels = open_samples(config.samples, config.range).image_shape
    size = height if height == width else None
    known: Any = channels if channels in (1, 3, 4) else None
    prepared = Preparation(image_size=size, channels=known, range=config.range)
    return load_images(config.data, prepared)


def _images_of_run(config: EvaluateConfig) -> DataConfig:
    """What `--data` and `--dataset` say, or else the images that the run learned, where its record
    says which."""
    given, run = config.data, config.run
    if run is None or given.data is not None or given.dataset is not None:
        return given
    try:
        folder = run.parents[1] if run.parent.name == CHECKPOINTS else run
        source = read_json(folder / CONFIG)["data"]["source"]
    except (ValueError, TypeError, KeyError):  # not of `train`, or damaged: the checkpoints count
        return given
    if source in DATASETS:
        return replace(given, dataset=source)
    if Path(source).is_absolute() and not Path(source).exists():
        problem = f"the images that the run learned, {source}, are no longer there"
        raise UsageError(f"--data: {problem}; --data PATH says where they are")
    # Relative to which folder, a record of before does not say.
    known = Path(source).is_absolute() or source.startswith(HUB)
    return replace(given, data=source) if known else given


def _wants_images(config: EvaluateConfig) -> bool:
    """Where statistics stand for the real images, these are read only if they are named."""
    return config.reference == "data" or config.data.data is not None


def _prepare(config: EvaluateConfig) -> tuple[DiffusionModel, Dataset | None]:
    """The run, and its images as it read them, whole and not mirrored."""
    run = load_chain(config)
    if not _wants_images(config):
        return run, None
    prepared = Preparation(**run.preparation)
    prepared = replace(prepared, flip=False, range=config.range or prepared.range)
    if prepared.crop == "random":
        prepared = replace(prepared, crop="center")
    try:
        data = load_images(config.data, prepared)
    except FieldError:
        if config.data.data is not None:
            raise
        problem = f"{config.data.source} cannot be prepared as the images that the run learned"
        raise UsageError(f"--dataset: {problem}; --data says where those are") from None
    return run, data
