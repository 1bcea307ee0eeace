"""`jax-ddpm evaluate`: figures for a model or for samples, from real images."""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from jax_ddpm._errors import FieldError
from jax_ddpm._table import counted, table
from jax_ddpm.cli.common import load_chain, load_images, make_sampler, say, start_devices
from jax_ddpm.cli.config import ChainConfig, DataConfig, EvaluateConfig
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.cli.terminal import bars
from jax_ddpm.data import DATASETS, Dataset, Preparation
from jax_ddpm.data.arrays import HUB
from jax_ddpm.io.checkpoint import list_checkpoints
from jax_ddpm.io.files import read_json, write_json
from jax_ddpm.runs import evaluate as measure
from jax_ddpm.runs import evaluate_samples
from jax_ddpm.runs.evaluating import open_samples
from jax_ddpm.runs.model import CHECKPOINTS
from jax_ddpm.training.hosts import run_on_all, run_on_writer

_TITLES = {
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
    "nearer_than_1_percent": "suspiciously near to a real image (1.0% expected)",
}
_SHARES = {"precision", "recall", "nearer_than_1_percent"}
_IN_LINES = {"agreement", "svc_held_out", "bits_per_dim", "nearest_real"}


def evaluate(config: EvaluateConfig) -> None:
    """Measure as `config` says, and print."""
    check_file("--json", config.json)
    check_file("--save-statistics", config.save_statistics, ".npz")
    source: DataConfig | None = config.data
    learned = None
    if config.reference == "data":
        source, learned = _images_of_run(config)
    elif config.data.dataset is not None:
        raise UsageError("--dataset: cannot be given with --reference; --data can")
    elif config.data.data is None:
        source = None
    options = {
        "seed": config.seed,
        "inception": config.inception,
        "reference": None if config.reference == "data" else config.reference,
        "statistics": config.save_statistics,
        "agreement": config.agreement,
    }
    data = "--data" if source is not None and source.data else "--dataset"
    with naming(data=data, folder="--out", statistics="--save-statistics", images="samples"):
        if config.samples is not None:
            figures = _of_samples(config.samples, config, source, options)
        else:
            figures = _of_model(config, source, learned, options)
    for line in report(figures):
        say(line)
    if (path := config.json) is not None:
        with writing("--json", path):
            measured = str(config.samples or config.run or config.pretrained)
            figures = {"samples" if config.samples else "run": measured, **figures}
            run_on_writer(lambda: write_json(path, figures))


def _of_model(
    config: EvaluateConfig, source: DataConfig | None, learned: str | None, options: dict[str, Any]
) -> dict[str, Any]:
    if config.run is None and config.pretrained is None:
        raise UsageError("expected --run, --pretrained or --samples, and one of them only")
    sampler = make_sampler(config)
    start_devices(config.devices)
    if config.out is not None and any(config.out.glob("*.npy")):
        say(f"the samples in {config.out} are not drawn again")
    run, data = run_on_all(lambda: load_chain(config)), None
    if source is not None:
        # As the run read them, but whole and not mirrored.
        before = Preparation(**run.preparation)
        crop = "center" if before.crop == "random" else before.crop
        prepared = replace(before, flip=False, crop=crop, range=config.range or before.range)
        data = _load(source, prepared, "the run's images")
        if source.data is None and data.image_shape != run.shape(1)[1:]:
            problem = f"{data.source} are not of the size of the samples"
            raise UsageError(f"--data: {problem}; --data PATH takes the images of the training")
        # A digest of numbers, not of files, is of the prepared images.
        alike = data.sha256 or (before.crop, before.range) == (prepared.crop, prepared.range)
        if learned and alike and data.digest() != learned:
            say(f"{data.source}: images or labels have changed since training")
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


def _of_samples(
    samples: Path, config: EvaluateConfig, source: DataConfig | None, options: dict[str, Any]
) -> dict[str, Any]:
    for name in (*(field.name for field in fields(ChainConfig)), "out", "num_scored", "batch_size"):
        if getattr(config, name) != getattr(EvaluateConfig, name):
            raise UsageError(f"--{name.replace('_', '-')}: cannot be given with --samples")
    start_devices(config.devices)
    data = None
    if source is not None:
        found = run_on_all(lambda: open_samples(samples, config.range))
        height, width, channels = found.image_shape
        size = height if height == width else None
        known: Any = channels if channels in (1, 3, 4) else None
        prepared = Preparation(image_size=size, channels=known, range=config.range)
        data = _load(source, prepared, "the samples")
    with bars() as show:
        options |= {"num": config.num, "range": config.range, "progress": show}
        return evaluate_samples(samples, data, **options)


def _load(source: DataConfig, preparation: Preparation, others: str) -> Dataset:
    """Real images, prepared as `others` are."""
    try:
        data = run_on_all(lambda: load_images(source, preparation))
    except FieldError:
        if source.data is not None:
            raise
        problem = f"{source.source} cannot be prepared like {others}; --data PATH takes real images"
        raise UsageError(f"--dataset: {problem}") from None
    for note in data.notes:
        say(note)
    return data


def _images_of_run(config: EvaluateConfig) -> tuple[DataConfig, str | None]:
    """The images of `--data` or `--dataset`, or else of the run's record; and the digest there."""
    given, run = config.data, config.run
    if run is None or given.data is not None or given.dataset is not None:
        return given, None
    try:
        paths = [run] if run.parent.name == CHECKPOINTS else list_checkpoints(run / CHECKPOINTS)
        path = [path for path in paths if config.checkpoint in (None, int(path.name))][-1]
        record = read_json(path / "state.json")["run"]["data"]
        source, learned = record["source"], record.get("sha256")
    except (ValueError, TypeError, KeyError, IndexError):  # not of `train`, or damaged
        return given, None
    if source in DATASETS:
        return replace(given, dataset=source), learned
    # A relative path does not say relative to what.
    if source.startswith(HUB) or (Path(source).is_absolute() and Path(source).exists()):
        return replace(given, data=source), learned
    problem = f"the images that the run learned, {source}, are not there"
    raise UsageError(f"--data: {problem}; --data PATH or --dataset NAME says where they are")


def report(figures: dict[str, Any]) -> Iterator[str]:
    """A table of the figures, other findings, and how they were measured: lines to read."""
    floor = dict(figures.get("held_out", {}))
    if "nearest_real" in figures:
        floor["nearest"] = figures["nearest_real"]
    others = [name for name, value in figures.items() if isinstance(value, float)]
    shown = [name for name in dict.fromkeys([*_TITLES, *others]) if name in figures]
    shown = [name for name in shown if name not in _IN_LINES and not name.endswith("_std")]
    if shown:
        rows = [("", counted(figures["num"], "sample"), "real images" if floor else "")]
        rows += [(_title(name), _number(figures, name), _number(floor, name)) for name in shown]
        yield table("<>>", rows)
    if floor:
        yield "real images: held-out images against the others, about what a perfect model scores"
    if "classifier_frechet_distance" in figures:
        yield "features of a small classifier, so no FID, which needs --inception and RGB images"
    if "agreement" in figures:
        yield (
            f"{figures['agreement']:.1%} of {figures['judged']:,} samples show the requested "
            f"class, by an SVC that is right on {figures['svc_held_out']:.1%} of held-out images"
        )
    if "bits_per_dim" in figures:
        yield f"at most {figures['bits_per_dim']:.3f} bits per dimension"
    yield from figures["notes"]
    for name, why in figures["left_out"].items():
        yield f"{_title(name)} is left out: {why}"
    recipe = dict(figures["recipe"])
    if "versions" in recipe:
        packages = recipe["versions"].items()
        recipe["versions"] = ", ".join(f"{package} {number}" for package, number in packages)
    rows = [(f"  {k}", f"{v:,}" if type(v) is int else str(v)) for k, v in recipe.items()]
    yield table("<<", [("how this was measured:",), *rows])


def _title(name: str) -> str:
    return _TITLES.get(name, name.replace("_", " "))


def _number(figures: dict[str, Any], name: str) -> str:
    """A figure and its spread."""
    if name not in figures:
        return ""
    value, spread = figures[name], figures.get(f"{name}_std")
    text = f"{value:.1%}" if name in _SHARES else f"{value:.4g}"
    return text if spread is None else f"{text} ± {spread:.2g}"
