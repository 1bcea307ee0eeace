"""Compile the programs that `runs` trains and draws with for a target, and say what they take."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_ddpm._errors import FieldError, check_choice
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.interop.model import init_variables
from jax_ddpm.models import SimpleUNet, UNet, ddpm_cifar10, ddpm_digits
from jax_ddpm.plan.compilation import Cost, Refused, TooLarge, compile_for, quiet
from jax_ddpm.plan.report import line
from jax_ddpm.plan.targets import Target
from jax_ddpm.runs.drawing import make_chain
from jax_ddpm.runs.programs import draw_programs, fit_programs, pieces
from jax_ddpm.runs.settings import Settings, named_schedule
from jax_ddpm.runs.training import computing
from jax_ddpm.samplers import ancestral
from jax_ddpm.training.sharding import device_mesh

Memory = dict[int, int | float]

_TRIALS = 5
_CLOSE = 1.1
_MARGIN = 0.98


def preset(name: str) -> DiffusionModel:
    """A network by name ("cifar10", "digits", "simple"), its weights as shapes."""
    check_choice("name", name, ("cifar10", "digits", "simple"))
    model: UNet | SimpleUNet
    if name == "cifar10":
        model, shape, schedule = ddpm_cifar10(), (32, 32, 3), named_schedule("linear", 1000)
    elif name == "digits":
        model, shape, schedule = ddpm_digits(), (8, 8, 1), named_schedule("cosine", 200)
    else:
        model, shape, schedule = SimpleUNet(), (64, 64, 3), named_schedule("linear", 200)
    variables = jax.eval_shape(lambda: init_variables(model, jax.random.key(0), shape))
    classes = 10 if name == "digits" else None
    return DiffusionModel(
        model,
        variables,
        schedule,
        shape,
        timestep_spacing="trailing",
        num_classes=classes,
        null_label=classes,
        guidance=2.0,
    )


def planned(run: DiffusionModel, *, dtype: str, remat: bool) -> DiffusionModel:
    """A run to plan with: it computes in `dtype`, and its weights are shapes of float32."""
    run = computing(run, dtype=dtype, remat=remat)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), run.variables)
    return run._replace(variables=shapes)


def measure_training(run: DiffusionModel, settings: Settings, target: Target) -> dict[str, Any]:
    """What a training step takes, in bytes, operations and seconds: a dispatch's share.

    Raises `FieldError` where batch or `fsdp` do not suit the target, and where its compiler refuses
    the program.
    """
    steps, batch = settings.dispatched(target.chip.platform), settings.batched()
    with quiet():
        devices = _devices(target, "batch_size", batch, settings.accumulate)
        if len(devices) % settings.fsdp:
            problem = f"expected a divisor of {len(devices)}, the devices of {target.name}"
            raise FieldError("fsdp", f"{problem}, got {settings.fsdp}")
        part = batch // settings.accumulate
        mesh = device_mesh(part, fsdp=settings.fsdp, devices=devices)
        programs = fit_programs(run, settings, mesh, jax.random.key(0))
        arguments = (programs.state, _batches(run, steps, batch, programs))
        row = _row(target, "train", batch, 1, len(devices), settings.dtype)
        return _measured(row, target, settings.dtype, programs.advance, arguments, 1 / steps)


def measure_sampling(
    run: DiffusionModel, num: int, target: Target, *, dtype: str, steps: int | None = None
) -> dict[str, Any]:
    """What a chain of `num` images at once takes (ancestral): that of a piece, times the pieces.

    Raises `FieldError` where `num` or `steps` do not suit the target or the run, and where its
    compiler refuses the program.
    """
    chain = make_chain(run, run.schedule.num_timesteps if steps is None else steps)
    with quiet():
        devices = _devices(target, "num", num)
        mesh = device_mesh(num, devices=devices)
        programs = draw_programs(run, chain, ancestral(), num, mesh)
        piece = pieces(chain)[0]
        row = _row(target, "sample", num, chain.num_timesteps, len(devices), dtype)
        times = chain.num_timesteps / piece
        arguments = (*programs.arguments, piece)
        return _measured(row, target, dtype, programs.advance, arguments, times)


def largest_training(
    run: DiffusionModel,
    settings: Settings,
    target: Target,
    row: dict[str, Any],
    trying: Callable[[int], None],
) -> tuple[list[dict[str, Any]], str]:
    """Search for the largest batch that fits from `row`, what `settings` themselves take.

    `trying` is called with each batch before it is compiled. Returns the row of what was found,
    unless that is `row` itself, and a line that says so; `row` gets a `largest_batch`.
    """
    tried = {row["images"]: row}

    def needed(batch: int) -> int | float:
        if batch not in tried:
            trying(batch)
            tried[batch] = measure_training(run, replace(settings, batch_size=batch), target)
        here = tried[batch]
        return max(here["needed"] or math.inf, 0 if here["fits"] else here["available"] + 1)

    unit = row["devices"] * settings.accumulate
    fits, fails = row["largest_batch"] = largest_batch(
        needed, row["available"], row["images"], unit
    )
    rest = "more were not tried" if fails is None else f"{fails:,} do not fit"
    if fits:
        share = 100 * tried[fits]["needed"] / row["available"]
        rest = f"fit, in {share:.0f} % of the memory; {rest}"
    found = [tried[fits]] if fits and fits != row["images"] else []
    return found, line("largest batch", f"{fits:,}", rest)


def largest_batch(
    needed: Callable[[int], int | float], available: int | float, first: int, unit: int
) -> tuple[int, int | None]:
    """The largest multiple of `unit` found to fit, and the smallest found not to, if any.

    `needed(batch)` is the memory of a batch, infinite where all that is known is that it does not
    fit. The search starts at `first` and ends within 10 % of the limit, or after five calls.
    """
    fits: Memory = {0: 0}
    fails: Memory = {}
    batch = first
    for _ in range(_TRIALS):
        memory = needed(batch)
        (fits if memory <= available else fails)[batch] = memory
        low, high = max(fits), min(fails, default=math.inf)
        if high <= max(_CLOSE * low, low + unit) or _CLOSE * fits[low] >= available:
            break
        batch = _next(fits, fails, available, unit)
    return max(fits), min(fails, default=None)


def _next(fits: Memory, fails: Memory, available: int | float, unit: int) -> int:
    """A little below where the line through the two points about the limit meets it."""
    low, high = max(fits), min(fails, default=None)
    memory = fits | fails
    x0, x1 = sorted(fits)[-2:] if high is None else (low, high)
    rise = memory[x1] - memory[x0]
    if 0 < rise < math.inf:
        guess = _MARGIN * (x0 + (available - memory[x0]) * (x1 - x0) / rise)
    else:
        guess = 2 * low if high is None else (low + high) / 2
    batch = int(guess) // unit * unit
    return max(batch, low + unit) if high is None else min(max(batch, low + unit), high - unit)


def _devices(target: Target, field: str, size: int, parts: int = 1) -> list[Any]:
    """Those of the target, which share `size` images evenly."""
    devices = target.devices()
    if size >= 2**31:  # some compilers do not outlive more
        raise FieldError(field, f"expected less than 2,147,483,648, got {size:,}")
    if size % (len(devices) * parts):
        multiple = f"expected a multiple of {len(devices) * parts}, the devices of {target.name}"
        accumulated = f" × {parts} parts" if parts > 1 else ""
        raise FieldError(field, f"{multiple}{accumulated}, got {size}")
    return devices


def _batches(run: DiffusionModel, steps: int, size: int, programs: Any) -> Any:
    place = {"sharding": programs.batch_sharding}
    # A recipe names its channels: its images are pictures, which stay bytes.
    pixels = np.float32 if run.preparation.get("channels") is None else np.uint8
    images = jax.ShapeDtypeStruct((steps, *run.shape(size)), pixels, **place)
    if run.num_classes is None:
        return {"images": images}
    labels = jax.ShapeDtypeStruct((steps, size), jnp.int32, **place)
    return {"images": images, "labels": labels}


def _row(
    target: Target, work: str, images: int, steps: int, devices: int, dtype: str
) -> dict[str, Any]:
    return {
        "target": target.name,
        "chip": target.chip.title,
        "devices": devices,
        "work": work,
        "images": images,
        "steps": steps,
        "dtype": dtype,
        "products": target.products(dtype),
        "available": target.memory,
    }


def _measured(
    row: dict[str, Any],
    target: Target,
    dtype: str,
    program: Any,
    arguments: tuple[Any, ...],
    times: float,
) -> dict[str, Any]:
    try:
        cost = compile_for(target, program, *arguments)
    except TooLarge as error:
        return {**row, "fits": False, "needed": error.needed, "refusal": str(error)}
    except Refused as error:
        raise FieldError(None, str(error)) from None
    return {**row, **_figures(cost.scaled(times), target, dtype)}


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
