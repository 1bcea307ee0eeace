"""How something was measured, so that another person can repeat it."""

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np

from jax_ddpm.data import Dataset
from jax_ddpm.evaluation.reference import Reference
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import flatten
from jax_ddpm.runs.model import PathLike
from jax_ddpm.samplers import Sampler
from jax_ddpm.schedule import NoiseSchedule


def drawn(run: DiffusionModel, chain: NoiseSchedule, sampler: Sampler) -> dict[str, Any]:
    """What decides samples, but for the seed and the classes."""
    rule: Any = inspect.unwrap(sampler.step)
    nonlocals = inspect.getclosurevars(rule).nonlocals if inspect.isfunction(rule) else {}
    options = {name: x for name, x in nonlocals.items() if isinstance(x, bool | int | float | str)}
    called = getattr(rule, "__qualname__", type(rule).__name__).partition(".")[0]
    weights = hashlib.sha256()
    for name, leaf in flatten(run.variables).items():
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(leaf).data)
    tables = hashlib.sha256(np.asarray([chain.betas, chain.timesteps], np.float64).tobytes())
    return {
        "sampler": ", ".join([called, *(f"{option} {x}" for option, x in sorted(options.items()))]),
        "steps": chain.num_timesteps,
        "chain": f"SHA-256 {tables.hexdigest()} of β and t",
        "guidance": run.guidance,
        **{option: str(value) for option, value in run.policy.items()},
        "weights": f"SHA-256 {weights.hexdigest()}",
    }


def compared(target: Reference, data: Dataset | None, reference: PathLike | None) -> dict[str, Any]:
    """What samples were compared with, and how."""
    if reference is not None:
        digest = hashlib.sha256(Path(reference).read_bytes()).hexdigest()
        against: dict[str, Any] = {"reference": f"{reference}, SHA-256 {digest}"}
    else:
        assert data is not None
        count = target.real.statistics[target.network.main].num
        against: dict[str, Any] = {
            "reference": f"{count:,} of the {len(data.images):,} images of {data.source}, "
            f"SHA-256 {data.digest()}"
        }
        if target.at_most is not None:
            against["compared"] = f"{target.at_most:,} samples"
        others, ones = target.halves
        against["held out"] = f"{ones:,} real images against {others:,} others"
    features = target.network.description
    return {"features": features, **against, "pixels": "rounded to 8 bits"}
