"""`jax-ddpm plan`: does it fit, and how long does it take, before the hardware is rented."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax

from jax_ddpm._errors import check_between, check_positive
from jax_ddpm._table import counted
from jax_ddpm.cli.common import load_images
from jax_ddpm.cli.config import PlanConfig
from jax_ddpm.cli.errors import UsageError, check_file, naming, writing
from jax_ddpm.data import Preparation
from jax_ddpm.io.files import write_json
from jax_ddpm.plan import measuring
from jax_ddpm.plan.compilation import NOTE, Plan, prepare, report, require_slice
from jax_ddpm.plan.targets import Target, parse_target, require_compiler
from jax_ddpm.runs import RECIPES, load_model
from jax_ddpm.runs.drawing import make_chain
from jax_ddpm.runs.settings import LayoutSettings


def plan(config: PlanConfig) -> None:
    """Compile what `config` says for each of its targets and print what it takes; exit code 1 if
    something does not fit."""
    check_positive(num=config.num, steps=config.steps)
    check_file("--json", config.json)
    if config.largest_batch and config.work == "sample":
        raise UsageError("--largest-batch: expected --work train or both, got sample")
    has_images = config.data.data is not None or config.data.dataset is not None
    if sum(each is not None for each in (config.model, config.recipe, config.run)) > 1:
        raise UsageError("expected one of --model, --recipe and --run")
    if config.run is not None and has_images:
        raise UsageError("--run: its network has its image size and classes: expected no images")
    name = config.recipe or config.model or ("digits" if has_images else "cifar10")
    recipe = RECIPES[name] if config.recipe else measuring.PRESETS[name]
    unsaid = vars(recipe.preparation if config.recipe else Preparation())
    given = [name for name, value in vars(config.images).items() if value != unsaid[name]]
    if given and not has_images:
        raise UsageError(f"--{given[0].replace('_', '-')}: comes with --data or --dataset")
    layout = {name: getattr(config, name) for name in LayoutSettings.__dataclass_fields__}
    batch = recipe.settings.batched() if config.recipe else 128
    batch = batch if config.batch_size is None else config.batch_size
    settings = replace(recipe.settings, **layout, batch_size=batch)
    targets, data = _targets(config.target), None
    if has_images:  # without a cache, pictures are not decoded before they are needed
        source = replace(config.data, data_cache=config.data.data_cache or "none")
        check_between("steps", config.steps or 1, 1, recipe.settings.timesteps)
        data = load_images(source, config.images)
    with naming(folder="--run", unet=f"--{'recipe' if config.recipe else 'model'} {name}"):
        run = load_model(config.run) if config.run else measuring.of_recipe(recipe, data)
    make_chain(run, config.steps)  # refuses too many
    run = measuring.planned(run, dtype=config.dtype, remat=config.remat)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables))
    network = f"{type(run.model).__name__} of {parameters:,} parameters"
    images = (
        f"images of {'×'.join(map(str, run.shape(1)[1:]))}, classes: {run.num_classes or 'none'}"
    )
    named = [config.run or config.recipe or config.model, data and data.source]
    title = ", ".join(str(each) for each in named if each) or name
    print(f"{title}: {network}, {images}, {config.dtype}")
    plans: list[Plan] = []

    def show(plan: Plan) -> None:
        plans.append(plan)
        print("\n" + report(plan))

    def train(size: int) -> Plan:
        if size != batch:
            print("trying", counted(size, "image"), file=sys.stderr, flush=True)
        return measuring.measure_training(run, replace(settings, batch_size=size), target, data)

    for target in targets:
        if config.work != "sample":
            show(first := train(batch))
            if config.largest_batch:
                unit = first.devices * config.accumulate
                plans[-1], found, line = measuring.largest_training(first, unit, train)
                if found not in (None, first):
                    show(found)
                print(line)
        if config.work != "train":
            options: Any = {"dtype": config.dtype, "steps": config.steps}
            show(measuring.measure_sampling(run, config.num, target, **options))
    if any(plan.fits for plan in plans):
        print(NOTE)
    if config.json is not None:
        with writing("--json", config.json):
            write_json(config.json, [plan.record() for plan in plans])
    if not all(plan.fits for plan in plans):
        sys.exit(1)


def _targets(names: Sequence[str]) -> list[Target]:
    """Those that there are compilers for, and that these take."""
    if not names:
        raise UsageError("--target: expected one or several, such as v5e:2x2 h100:8")
    try:
        targets = [parse_target(name) for name in names]
        for target in targets:
            require_compiler(target)
        prepare()
        for target in targets:
            require_slice(target)
    except ValueError as error:
        raise UsageError(f"--target: {error}") from None
    return targets
