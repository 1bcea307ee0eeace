"""`jax-ddpm evaluate`: figures for a model or for samples, from real images."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import Any

from jax_ddpm._checks import FieldError
from jax_ddpm.cli.chain import load_chain, make_sampler
from jax_ddpm.cli.config import ChainConfig, EvaluateConfig
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.cli.images import load_images
from jax_ddpm.cli.progress import bar
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.io.json import write_json
from jax_ddpm.runs import Progress, Run, evaluate_samples
from jax_ddpm.runs import evaluate as measure
from jax_ddpm.runs.measuring import check_measurable
from jax_ddpm.runs.samples import kept_samples, open_samples
from jax_ddpm.training.hosts import on_writer, together

__all__ = ["evaluate"]

_NAMES = {
    "fid": "FID",
    "fid_768": "FID of 768 features",
    "fid_192": "FID of 192 features",
    "fid_64": "FID of 64 features",
    "kid": "KID",
    "inception_score": "inception score",
    "classifier_frechet_distance": "Fréchet distance (classifier)",
    "classifier_kernel_distance": "kernel distance (classifier)",
    "precision": "precision",
    "recall": "recall",
    "nearest": "distance to the nearest real image",
    "nearer_than_1_percent": "suspiciously near to one (1 % expected)",
}
_MANY = 10_000
_OF_IMAGES = ("data", "image_size", "channels")
_SHARES = {"precision", "recall", "nearer_than_1_percent"}


def evaluate(config: EvaluateConfig) -> None:
    """Measure as `config` says, and print."""
    check_file("--json", config.json)
    check_file("--save-statistics", config.save_statistics, ".npz")
    options = {
        "seed": config.seed,
        "inception": config.inception,
        "reference": None if config.reference == "data" else config.reference,
        "statistics": config.save_statistics,
    }
    data = "--data" if config.data.data else "--dataset"
    with naming(data=data, folder="--out", statistics="--save-statistics"):
        if config.samples is not None:
            figures = _of_samples(config, options)
        else:
            figures = _of_model(config, options)
    for line in (*_report(figures), *_left_out(config, figures), *_recipe(figures["recipe"])):
        say(line)
    if (path := config.json) is not None:
        with writing("--json", path):
            source = str(config.samples or config.run or config.pretrained)
            figures = {"samples" if config.samples else "run": source, **figures}
            on_writer(lambda: write_json(path, figures))


def _of_model(config: EvaluateConfig, options: dict[str, Any]) -> dict[str, Any]:
    if config.run is None and config.pretrained is None:
        raise UsageError("expected --run, --pretrained or --samples, and one of them only")
    sampler = make_sampler(config)
    if config.out is not None and (found := kept_samples(config.out)):
        say(f"{found:,} samples are in {config.out} already")
    start_devices(config.devices)
    run, data = together(lambda: _prepare(config))
    with _bars() as show:
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
        data = together(lambda: _real_images(config))
        with _bars() as show:
            return evaluate_samples(config.samples, data, num=config.num, progress=show, **options)
    except FieldError as error:
        if error.field in _OF_IMAGES and config.data.data is None:
            problem = f"{config.data.dataset} cannot be prepared as the samples are"
            raise UsageError(f"--dataset: {problem}; --data says where real images are") from None
        raise


def _real_images(config: EvaluateConfig) -> Dataset | None:
    """Brought to the samples' size and channels."""
    if not _wants_images(config):
        return None
    assert config.samples is not None
    height, width, channels = open_samples(config.samples).image_shape
    size = height if height == width else None
    known: Any = channels if channels in (1, 3, 4) else None
    return load_images(config.data, Preparation(image_size=size, channels=known))


def _wants_images(config: EvaluateConfig) -> bool:
    """Where statistics stand for the real images, these are read only if they are named."""
    return config.reference == "data" or config.data.data is not None


def _prepare(config: EvaluateConfig) -> tuple[Run, Dataset | None]:
    """The run, and its images as it read them, whole and not mirrored."""
    run = load_chain(config)
    if not _wants_images(config):
        return run, None
    prepared = replace(run.preparation, flip=False)
    if prepared.crop == "random":
        prepared = replace(prepared, crop="center")
    try:
        data = load_images(config.data, prepared)
    except FieldError:
        if config.data.data is not None:
            raise
        problem = f"{config.data.dataset} cannot be prepared as the images that the run learned"
        raise UsageError(f"--dataset: {problem}; --data says where those are") from None
    check_measurable(run, data)
    return run, data


@contextmanager
def _bars() -> Iterator[Callable[[Progress], None]]:
    """A bar for each piece of work, one after the other."""
    with ExitStack() as stack:
        shown: dict[str, Callable[[Progress], None]] = {}

        def show(progress: Progress) -> None:
            what = progress.what
            if what not in shown:
                stack.close()  # that of what was done before
                unit = "step" if what == Progress._field_defaults["what"] else "image"
                shown[what] = stack.enter_context(bar(what, unit))
            shown[what](progress)

        yield show


def _report(figures: dict[str, Any]) -> Iterator[str]:
    """A table of the figures, and what else was found."""
    floor = dict(figures.get("held_out", {}))
    if "nearest_real" in figures:
        floor["nearest"] = figures["nearest_real"]
    rows = [["", "samples", "real images"] if floor else ["", "samples"]]
    for name, called in _NAMES.items():
        if name in figures:
            columns = [figures, floor] if floor else [figures]
            rows.append([called, *(_number(each, name) for each in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for title, *numbers in rows if len(rows) > 1 else ():
        cells = [title.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(numbers, widths[1:], strict=True)]
        yield "   ".join(cells).rstrip()
    if "held_out" in figures:
        yield "real images: some that were held out against others, as a perfect model would score"
    if "classifier_frechet_distance" in figures:
        yield "features of a small classifier, so no FID, which needs --inception and RGB images"
    if "agreement" in figures:
        yield (
            f"{figures['agreement']:.1%} of {figures['judged']:,} samples are what was asked for, "
            f"by an SVC that is right on {figures['svc_held_out']:.1%} of real images held out "
            "from it"
        )
    if "bits_per_dim" in figures:
        yield f"{figures['bits_per_dim']:.3f} bits per dimension at most, on the images learned"


def _left_out(config: EvaluateConfig, figures: dict[str, Any]) -> Iterator[str]:
    """What a user might miss, and why it is not there."""
    num = config.num or figures["recipe"].get("num", 0)
    if "fid" in figures and 0 < num < _MANY:
        yield f"FID of {num:,} samples is larger than of many: compare it with that of as many"
    if config.reference != "data":
        yield "statistics stand for the real images: what compares image with image is left out"
    elif config.samples is None:
        if "agreement" not in figures and config.num != 0:
            yield "agreement is left out: the model has no classes"
        if "bits_per_dim" not in figures and config.num_scored != 0:
            yield "bits per dimension are left out: the pixels are not those of 8 bits"


def _recipe(recipe: dict[str, Any]) -> Iterator[str]:
    yield "measured so:"
    width = max(map(len, recipe))
    for name, value in recipe.items():
        if name == "versions":
            value = ", ".join(f"{package} {number}" for package, number in value.items())
        text = f"{value:,}" if type(value) is int else value
        yield f"  {name:<{width}}  {text}"


def _number(figures: dict[str, Any], name: str) -> str:
    """A figure and its spread."""
    if name not in figures:
        return ""
    value, spread = figures[name], figures.get(f"{name}_std")
    text = f"{value:.1%}" if name in _SHARES else f"{value:.4g}"
    return text if spread is None else f"{text} ± {spread:.2g}"
