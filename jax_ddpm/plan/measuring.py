"""Compile the programs that `runs` trains and draws with for a target, and say what they take."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm._errors import FieldError
from jax_ddpm._table import counted
from jax_ddpm.data import Dataset, Preparation
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.models import ddpm_cifar10
from jax_ddpm.plan.compilation import Plan, compile_for, quiet
from jax_ddpm.plan.targets import Target
from jax_ddpm.runs import RECIPES, Settings
from jax_ddpm.runs.drawing import make_chain
from jax_ddpm.runs.programs import draw_programs, fit_programs, pieces
from jax_ddpm.runs.recipes import Recipe, unet_fields
from jax_ddpm.runs.training import computing, untrained
from jax_ddpm.samplers import ancestral
from jax_ddpm.training.sharding import device_mesh

_CIFAR10: Any = {"unet": unet_fields(ddpm_cifar10()), "schedule": "linear", "timesteps": 1000}
_SIMPLE: Any = {"model": "simple", "schedule": "linear"}
PRESETS = {
    "cifar10": Recipe(Settings(**_CIFAR10), Preparation(), (32, 32, 3), None, "Ho et al. 2020"),
    "digits": RECIPES["digits"],
    "simple": Recipe(Settings(**_SIMPLE), Preparation(), (64, 64, 3), None, "the tutorial"),
}
"""Networks by name; all are trained as the digits are."""


def of_recipe(recipe: Recipe, data: Dataset | None = None) -> DiffusionModel:
    """The network that a recipe trains on `data`, or on images as it expects them; its weights are
    shapes."""
    settings, preparation, image_shape, num_classes, _ = recipe
    if data is not None:
        image_shape, num_classes = data.image_shape, data.num_classes
        preparation = data.preparation
    run = untrained(settings, image_shape, num_classes)
    return run._replace(preparation=preparation.record())


def planned(run: DiffusionModel, *, dtype: str, remat: bool) -> DiffusionModel:
    """A run to plan with: it computes in `dtype`, and its weights are shapes of float32."""
    run = computing(run, dtype=dtype, remat=remat)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, np.float32), run.variables)
    return run._replace(variables=shapes)


@quiet()
def measure_training(
    run: DiffusionModel, settings: Settings, target: Target, data: Dataset | None = None
) -> Plan:
    """What a training step takes, in bytes, operations and seconds: a dispatch's share.

    Raises `FieldError` where batch or `fsdp` do not suit the target, and where its compiler refuses
    the program.
    """
    steps, batch = settings.dispatched(target.chip.platform), settings.batched()
    mesh = _mesh(target, "batch_size", batch, settings.accumulate, settings.fsdp)
    programs = fit_programs(run, settings, mesh, jax.random.key(0))
    # A recipe names its channels: its images are pictures, which stay bytes.
    pixels = np.dtype("float32" if run.preparation.get("channels") is None else "uint8")
    images = jax.ShapeDtypeStruct(run.shape(1), pixels) if data is None else data.images
    each: dict[str, Any] = {"images": (images.shape[1:], images.dtype)}
    if run.num_classes is not None:
        each["labels"] = (), np.int32
    if data is not None and data.extents is not None:
        each["extents"] = (2,), np.int32
    batches = {
        name: jax.ShapeDtypeStruct((steps, batch, *shape), dtype, sharding=programs.batch_sharding)
        for name, (shape, dtype) in each.items()
    }
    plan = Plan(target, mesh.size, "train", batch, 1, settings.dtype)
    return compile_for(plan, programs.advance, (programs.state, batches), 1 / steps)


@quiet()
def measure_sampling(
    run: DiffusionModel, num: int, target: Target, *, dtype: str, steps: int | None = None
) -> Plan:
    """What a chain of `num` images at once takes (ancestral): that of a piece, times the pieces.

    Raises `FieldError` where `num` or `steps` do not suit the target or the run, and where its
    compiler refuses the program.
    """
    chain = make_chain(run, run.schedule.num_timesteps if steps is None else steps)
    mesh = _mesh(target, "num", num)
    programs = draw_programs(run, chain, ancestral(), num, mesh)
    piece = pieces(chain)[0]
    plan = Plan(target, mesh.size, "sample", num, chain.num_timesteps, dtype)
    arguments = (*programs.arguments, piece)
    return compile_for(plan, programs.advance, arguments, chain.num_timesteps / piece)


def largest_training(
    first: Plan, unit: int, measure: Callable[[int], Plan]
) -> tuple[Plan, Plan | None, str]:
    """Search for the largest batch that fits, a multiple of `unit`, from a plan of one.

    `measure` plans another. The search ends within 10 % of the limit, or after five plans. Returns
    `first` with its `largest_batch`, the plan of that batch if any fits, and a line that says so.
    """
    available, batch, low, high = first.target.memory, first.images, 0, None
    plans, memory = {batch: first}, {0: 0.0}
    for _ in range(5):
        plan = plans[batch] = plans.get(batch) or measure(batch)
        needed = plan.needed or math.inf
        memory[batch] = needed if plan.fits else max(needed, available + 1)
        low = max(size for size, each in memory.items() if each <= available)
        high = min((size for size, each in memory.items() if each > available), default=None)
        close = high is not None and high <= max(1.1 * low, low + unit)
        if close or 1.1 * memory[low] >= available:
            break
        # A little below where the line through the two points about the limit meets it.
        x0, x1 = sorted(memory)[-2:] if high is None else (low, high)
        rise = memory[x1] - memory[x0]
        guess = 2 * low if high is None else (low + high) / 2
        if 0 < rise < math.inf:
            guess = 0.98 * (x0 + (available - memory[x0]) * (x1 - x0) / rise)
        batch = max(int(guess // unit) * unit, low + unit)
        batch = batch if high is None else min(batch, high - unit)
    rest = "more were not tried" if high is None else f"{counted(high, 'image')} did not fit"
    if low:
        rest = f"in {memory[low] / available:.0%} of the memory; {rest}"
    line = f"  largest batch: {counted(low, 'image')}, {rest}"
    return first._replace(largest_batch=(low, high)), plans.get(low), line


def _mesh(target: Target, field: str, size: int, parts: int = 1, fsdp: int = 1) -> Mesh:
    """Of all devices of the target, which share each part of `size` images evenly."""
    devices = target.devices()
    if size >= 2**31:  # some compilers do not outlive more
        raise FieldError(field, f"expected less than 2,147,483,648, got {size:,}")
    if size % (unit := len(devices) * parts):
        here = f"the {len(devices)} devices of {target.name}"
        raise FieldError(field, f"expected a multiple of {unit} for {here}, got {size}")
    return device_mesh(size // parts, fsdp=fsdp, devices=devices)
