"""`jax-ddpm plan`: does it fit, and how long does it take, before the hardware is rented."""

import sys
from dataclasses import replace
from functools import partial

import jax

from jax_ddpm._errors import check_positive
from jax_ddpm.cli.config import PlanConfig
from jax_ddpm.cli.terminal import UsageError, check_file, naming, writing
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.files import write_json
from jax_ddpm.plan.compilation import Refused, prepare, quiet, require_slice
from jax_ddpm.plan.measuring import (
    largest_training,
    measure_sampling,
    measure_training,
    planned,
    preset,
)
from jax_ddpm.plan.report import notes, report
from jax_ddpm.plan.targets import Target, parse_target, require_compiler
from jax_ddpm.runs import RECIPES, Settings, load_model
from jax_ddpm.runs.drawing import make_chain
from jax_ddpm.runs.settings import LayoutSettings
from jax_ddpm.runs.training import untrained


def plan(config: PlanConfig) -> None:
    """Compile what `config` says for each of its targets and print what it takes; exit code 1 if
    something does not fit."""
    if not config.target:
        raise UsageError("--target: expected one or several, such as v5e:2x2 h100:8")
    check_positive(num=config.num, steps=config.steps)
    settings = _settings(config)
    check_file("--json", config.json)
    if config.largest_batch and config.work == "sample":
        raise UsageError("--largest-batch: expected --work train or both, got sample")
    targets = _targets(config)
    run = _load(config)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables))
    print(
        f"{config.run or config.recipe or config.model}: {type(run.model).__name__} "
        f"of {parameters:,} parameters, {'×'.join(map(str, run.shape(1)[1:]))}, {config.dtype}"
    )
    say = partial(print, "trying this many images:", file=sys.stderr, flush=True)
    rows = []
    for target in targets:
        if config.work != "sample":
            rows.append(measure_training(run, settings, target))
            print("\n" + report(rows[-1]))
            if config.largest_batch:
                found, summary = largest_training(run, settings, target, rows[-1], say)
                for row in found:
                    print("\n" + report(row))
                rows += found
                print(summary)
        if config.work != "train":
            rows.append(
                measure_sampling(run, config.num, target, dtype=config.dtype, steps=config.steps)
            )
            print("\n" + report(rows[-1]))
    for note in notes(rows, [target.chip.platform for target in targets]):
        print("\n" + note)
    if config.json is not None:
        with writing("--json", config.json):
            write_json(config.json, rows)
    if not all(row["fits"] for row in rows):
        sys.exit(1)


def _settings(config: PlanConfig) -> Settings:
    """Those of the recipe if there is one, with what flags say."""
    given = {name: getattr(config, name) for name in LayoutSettings.__dataclass_fields__}
    if config.batch_size is not None:
        given["batch_size"] = config.batch_size
    settings = RECIPES[config.recipe].settings if config.recipe else Settings(batch_size=128)
    return replace(settings, **given)


def _targets(config: PlanConfig) -> list[Target]:
    """Those that there are compilers for, and that these take."""
    try:
        targets = [parse_target(text) for text in config.target]
        for target in targets:
            require_compiler(target)
        prepare()
        with quiet():
            for target in targets:
                require_slice(target)
    except (ValueError, Refused) as error:
        raise UsageError(f"--target: {error}") from None
    return targets


def _load(config: PlanConfig) -> DiffusionModel:
    """The network, its weights as shapes, under `--dtype` and `--remat`."""
    if config.run is not None:
        with naming(folder="--run"):
            run = load_model(config.run)
    elif config.recipe is not None:
        recipe = RECIPES[config.recipe]
        run = untrained(recipe.settings, recipe.image_shape, recipe.num_classes)
        run = run._replace(preparation=recipe.preparation.record())
    else:
        run = preset(config.model)
    make_chain(run, config.steps)  # refuses too many
    return planned(run, dtype=config.dtype, remat=config.remat)
