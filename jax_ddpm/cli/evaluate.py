"""`jax-ddpm evaluate`: figures for a model, from the data that it learned."""

from dataclasses import replace

from jax_ddpm._checks import FieldError, check_positive
from jax_ddpm.cli.chain import load_chain, make_sampler
from jax_ddpm.cli.config import DevicesConfig, EvaluateConfig
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.cli.images import load_images
from jax_ddpm.cli.progress import bar
from jax_ddpm.data import Dataset
from jax_ddpm.io.json import write_json
from jax_ddpm.runs import Run
from jax_ddpm.runs import evaluate as measure
from jax_ddpm.runs.measuring import check_measurable
from jax_ddpm.training.hosts import on_writer, together

__all__ = ["evaluate"]


def evaluate(config: EvaluateConfig) -> None:
    """Measure as `config` says, and print."""
    check_positive(num=config.num, steps=config.steps)
    check_file("--json", config.json)
    sampler = make_sampler(config)
    start_devices(DevicesConfig())
    options = {"num": config.num, "steps": config.steps, "sampler": sampler, "seed": config.seed}
    with naming(data="--data" if config.data.data else "--dataset"):
        run, data = together(lambda: _prepare(config))
        with bar("sampling") as show:
            figures = measure(run, data, **options, progress=show)
    if "agreement" in figures:
        say(
            f"{config.num:,} samples ({figures['steps']} {config.sampler} steps, guidance "
            f"{run.guidance:g}): {figures['agreement']:.1%} are what was asked for, by an SVC "
            f"that is right on {figures['svc_held_out']:.1%} of real images held out from it"
        )
    else:
        say("agreement is left out: the model has no classes")
    if "bits_per_dim" in figures:
        say(f"{figures['bits_per_dim']:.3f} bits per dimension at most, on the images learned")
    else:
        say("bits per dimension are left out: the pixels are not those of 8 bits")
    if not figures:
        raise UsageError("--run: nothing to measure: no classes, and no pixels of 8 bits")
    if (path := config.json) is not None:
        with writing("--json", path):
            figures = {"run": str(config.run or config.pretrained), **figures}
            on_writer(lambda: write_json(path, figures))


def _prepare(config: EvaluateConfig) -> tuple[Run, Dataset]:
    """The run, and its images as it read them, whole and not mirrored."""
    run = load_chain(config)
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
