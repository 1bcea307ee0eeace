"""`jax-ddpm plan`: does it fit, and how long does it take, before the hardware is rented."""

import math
import sys
from typing import Any

import jax
import numpy as np

from jax_ddpm.cli.config import PlanConfig, UsageError, check_file, naming, positive, writing
from jax_ddpm.cli.programs import computing, sample_program, train_program
from jax_ddpm.cli.runs import Run, init_variables, load_model, named_schedule
from jax_ddpm.interop import Pretrained
from jax_ddpm.io.json import write_json
from jax_ddpm.models import SimpleUNet, UNet, ddpm_cifar10, ddpm_digits
from jax_ddpm.plan.compilation import (
    Cost,
    Refused,
    TooLarge,
    compile_for,
    prepare,
    quiet,
    require_slice,
)
from jax_ddpm.plan.search import largest_batch
from jax_ddpm.plan.targets import Target, parse_target, require_compiler

__all__ = ["load", "measure", "plan"]


def plan(config: PlanConfig) -> None:
    """Compile what `config` says for each of its targets and print what it takes; exit code 1 if
    something does not fit."""
    if not config.target:
        raise UsageError("--target: expected one or several, such as v5e:2x2 h100:8")
    positive(config, "batch_size", "num", "steps", "fsdp", "accumulate")
    check_file("--json", config.json)
    if config.largest_batch and config.work == "sample":
        raise UsageError("--largest-batch: expected --work train or both, got sample")
    try:
        targets = [parse_target(text) for text in config.target]
    except ValueError as error:
        raise UsageError(f"--target: {error}") from None
    for target in targets:
        require_compiler(target)
    prepare()
    try:
        with quiet():
            for target in targets:
                require_slice(target)
    except Refused as error:
        raise UsageError(f"--target: {error}") from None
    run = load(config)
    model: Any = run.pretrained.model
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.pretrained.variables))
    print(
        f"{config.run or config.model}: {type(model).__name__} of {parameters:,} parameters, "
        f"{'×'.join(map(str, run.image_shape))}, {config.dtype}"
    )
    rows = []
    for target in targets:
        for work in ("train", "sample") if config.work == "both" else (config.work,):
            row = measure(config, run, target, work)
            rows.append(row)
            print("\n" + _report(row))
            if config.largest_batch and work == "train":
                rows += _largest(config, run, target, row)
    if any(row["fits"] for row in rows):
        print(
            "\nestimate: the longest of the three times above it, at the chips' peak figures and "
            "without the time\nthat operations take to start. Real programs take longer."
        )
    if any(target.chip.platform == "cuda" for target in targets):
        print(
            "\nOf a GPU's memory JAX takes 75 %, unless XLA_PYTHON_CLIENT_MEM_FRACTION says "
            "otherwise."
        )
    if config.json is not None:
        with writing("--json", config.json):
            write_json(config.json, rows)
    if not all(row["fits"] for row in rows):
        sys.exit(1)


def load(config: PlanConfig) -> Run:
    """The network, its weights as shapes, under `--dtype` and `--remat`."""
    if config.run is not None:
        with naming("--run"):
            run = load_model(config.run)
    else:
        run = _preset(config.model)
    run = computing(run, dtype=config.dtype, remat=config.remat)
    variables = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), run.pretrained.variables
    )
    pretrained = run.pretrained._replace(variables=variables)
    timesteps = pretrained.schedule.num_timesteps
    if config.steps is not None and config.steps > timesteps:
        raise UsageError(
            f"--steps: expected at most {timesteps}, the model's timesteps, got {config.steps}"
        )
    return run._replace(pretrained=pretrained)


def _preset(name: str) -> Run:
    model: UNet | SimpleUNet
    if name == "cifar10":
        model, shape, schedule = ddpm_cifar10(), (32, 32, 3), named_schedule("linear", 1000)
    elif name == "digits":
        model, shape, schedule = ddpm_digits(), (8, 8, 1), named_schedule("cosine", 200)
    else:
        model, shape, schedule = SimpleUNet(), (64, 64, 3), named_schedule("linear", 200)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))
    classes = 10 if name == "digits" else None
    pretrained = Pretrained(model, variables, schedule, timestep_spacing="trailing")
    return Run(pretrained, shape, classes, null_label=classes, guidance=2.0)


def measure(
    config: PlanConfig, run: Run, target: Target, work: str, batch_size: int | None = None
) -> dict[str, Any]:
    """Compile `work` for `target`: what it takes, in bytes, operations and seconds."""
    size, flag = (config.num, "--num") if work == "sample" else (config.batch_size, "--batch-size")
    size = batch_size or size
    steps = config.steps or run.pretrained.schedule.num_timesteps
    with quiet():
        devices = target.devices()
        row: dict[str, Any] = {
            "target": target.name,
            "chip": target.chip.title,
            "devices": len(devices),
            "work": work,
            "images": size,
            "steps": steps if work == "sample" else 1,
            "dtype": config.dtype,
            "products": target.products(config.dtype),
            "available": target.memory,
        }
        if size >= 2**31:  # some compilers do not outlive more
            raise UsageError(f"{flag}: expected less than 2,147,483,648, got {size:,}")
        parts = 1 if work == "sample" else config.accumulate
        if size % (len(devices) * parts):
            accumulated = f" × {parts} parts" if parts > 1 else ""
            raise UsageError(
                f"{flag}: expected a multiple of {len(devices) * parts}, the devices of "
                f"{target.name}{accumulated}, got {size}"
            )
        if work == "sample":
            program, arguments = sample_program(run, size, steps, devices)
        else:
            if len(devices) % config.fsdp:
                raise UsageError(
                    f"--fsdp: expected a divisor of {len(devices)}, the devices of {target.name}, "
                    f"got {config.fsdp}"
                )
            program, arguments = train_program(
                run, size, devices, fsdp=config.fsdp, accumulate=parts
            )
        try:
            cost = compile_for(target, program, *arguments)
        except TooLarge as error:
            return {**row, "fits": False, "needed": error.needed, "refusal": str(error)}
        except Refused as error:
            raise UsageError(str(error)) from None
    return {**row, **_figures(cost, target, config.dtype)}


def _largest(
    config: PlanConfig, run: Run, target: Target, row: dict[str, Any]
) -> list[dict[str, Any]]:
    """Search from `row`, print what is found, and return it unless it is `row` itself."""
    tried = {row["images"]: row}

    def needed(batch: int) -> int | float:
        if batch not in tried:
            print(f"trying {batch:,} images …", file=sys.stderr, flush=True)
            tried[batch] = measure(config, run, target, "train", batch)
        here = tried[batch]
        return max(here["needed"] or math.inf, 0 if here["fits"] else here["available"] + 1)

    unit = row["devices"] * config.accumulate
    fits, fails = row["largest_batch"] = largest_batch(
        needed, row["available"], row["images"], unit
    )
    found = [tried[fits]] if fits and fits != row["images"] else []
    for each in found:
        print("\n" + _report(each))
    rest = "more were not tried" if fails is None else f"{fails:,} do not fit"
    if fits:
        share = 100 * tried[fits]["needed"] / row["available"]
        rest = f"fit, in {share:.0f} % of the memory; {rest}"
    print(_line("largest batch", f"{fits:,}", rest))
    return found


def _figures(cost: Cost, target: Target, dtype: str) -> dict[str, Any]:
    rates = target.rates(dtype)
    seconds = cost.seconds(rates)
    bound = max(seconds, key=lambda name: seconds[name])
    return {
        "fits": cost.memory <= target.memory,
        "needed": cost.memory,
        **cost._asdict(),
        "collectives": [each._asdict() for each in cost.collectives],
        "rates": rates,
        "seconds": seconds,
        "bound": bound,
        "estimate": seconds[bound],
    }


def _report(row: dict[str, Any]) -> str:
    """A block of lines about one program on one target."""
    images, devices, sampling = row["images"], row["devices"], row["work"] == "sample"
    what = f"{images:,} images"
    if sampling:
        what += f" × {row['steps']:,} steps"
    if devices > 1:
        what += f", {images // devices:,} images a device"
    plural = "s" if devices > 1 else ""
    lines = [f"{row['work']} on {row['target']}, {devices} device{plural}: {what}"]
    available = f"{_bytes(row['available'])} a device"
    if row["fits"]:
        lines.append(_line("fits", _bytes(row["needed"]), f"of {available}"))
    elif row["needed"] is None:
        lines.append(_line("does not fit", "", available))
    else:
        over = _bytes(row["needed"] - row["available"])
        lines.append(
            _line("does not fit", _bytes(row["needed"]), f"of {available}: {over} too much")
        )
    if "refusal" in row:
        return "\n".join([*lines, f"  {row['refusal']}"])
    lines += [
        _line("  arguments", _bytes(row["arguments"])),
        _line("  outputs", _bytes(row["outputs"]), _given_back(row)),
        _line("  temporaries", _bytes(row["temporaries"])),
    ]
    if row["code"]:
        lines.append(_line("  program", _bytes(row["code"])))
    if not row["fits"]:
        return "\n".join(lines)
    seconds, rates = row["seconds"], row["rates"]
    lines += [
        _line(
            "compute",
            _amount(row["flops"], "FLOP"),
            f"{_time(seconds['compute'])} at {_amount(rates['compute'], 'FLOP/s')} in "
            f"{row['products']}",
        ),
        _line(
            "memory traffic",
            _amount(row["traffic"], "B"),
            f"{_time(seconds['memory'])} at {_amount(rates['memory'], 'B/s')}",
        ),
    ]
    for each in row["collectives"]:
        time = _time(each["sent"] / rates["interconnect"])
        rest = f"{time} at {_amount(rates['interconnect'], 'B/s')}"
        lines.append(
            _line(f"{each['kind']} ×{each['times']:,}", _amount(each["nbytes"], "B"), rest)
        )
    estimate = row["estimate"]
    speed = f"{_number(images / estimate)} images/s"
    if not sampling:
        speed = f"{_number(1 / estimate)} steps/s, {speed}"
    lines.append(_line("estimate", _time(estimate), f"bound by {row['bound']}: at best {speed}"))
    return "\n".join(lines)


def _given_back(row: dict[str, Any]) -> str:
    if not row["aliased"]:
        return ""
    return f"{_bytes(row['aliased'])} of it in the arguments' place"


def _line(name: str, value: str, rest: str = "") -> str:
    return f"  {name:<18}{value:>12}   {rest}".rstrip()


def _bytes(count: float) -> str:
    if count < 2**20:
        return f"{count / 2**10:,.1f} KiB"
    return f"{count / 2**20:,.1f} MiB" if count < 2**30 else f"{count / 2**30:,.2f} GiB"


def _amount(count: float, unit: str) -> str:
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")):
        if count >= factor:
            return f"{count / factor:,.3g} {prefix}{unit}"
    return f"{count / 1e3:,.3g} k{unit}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _time(seconds: float) -> str:
    if seconds >= 120:
        return f"{seconds / 60:,.1f} min"
    for factor, unit in ((1, "s"), (1e-3, "ms")):
        if seconds >= factor:
            return f"{seconds / factor:,.3g} {unit}"
    return f"{seconds / 1e-6:,.3g} µs"
