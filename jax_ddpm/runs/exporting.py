"""The whole sampler, weights included, as one StableHLO file that runs without this library.

The file is a serialized `jax.export`. JAX and the package flatbuffers run it, on any platform
that it was lowered for and in batches of any size:

    sampler = jax.export.deserialize(bytearray(open("sampler.jaxexport", "rb").read()))
    images = sampler.call(key, samples)           # of a model without classes
    images = sampler.call(key, samples, labels)   # of one with classes

`samples` int32 [batch] are numbers, and a sample's number decides its noise (see `noise`): for
one key, 0, 1, 2, … are the pictures that `draw` draws.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import Exported

from jax_ddpm._errors import FieldError, check_choice
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import check_weights, flatten
from jax_ddpm.io.files import read_json, replace_file, write_json
from jax_ddpm.noise import sample_noise
from jax_ddpm.runs.drawing import make_chain, with_guidance
from jax_ddpm.runs.model import PathLike, describe
from jax_ddpm.runs.programs import guided_denoise_fn
from jax_ddpm.samplers import Sampler, ddim
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.schedule import NoiseSchedule

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
_SAMPLES = "int32 [batch], each sample's number, which decides its noise"
_OF_THE_RUN = ("scheduler", "num_classes", "null_label", "guidance", "versions")


def export(
    path: PathLike,
    model: DiffusionModel,
    *,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: Sampler | None = None,
    platforms: Sequence[str] = ("cpu", "cuda", "tpu"),
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Write a run's sampler to `path`, and what it is to `path` + ".json"; returns the latter.

    Args:
      path: of the file; both are written over.
      model: from `load_run`, `load_diffusers` or `load_openai`.
      steps: of the reverse chain. Default: 50, or all if fewer.
      guidance: scale of classifier-free guidance, 1 for none. Default: the run's.
      sampler: the update rule. Default: `ddim()`.
      platforms: where it will run, of "cpu", "cuda", "rocm" and "tpu".
      extra: also goes into the JSON.

    Raises:
      FieldError: naming the argument that is wrong, or a weight that is not finite.
      OSError: a file cannot be written.
    """
    if isinstance(platforms, str) or not platforms:
        raise FieldError("platforms", f"expected a list, such as ['cpu'], got {platforms!r}")
    for each in platforms:
        check_choice("platforms", each, PLATFORMS)
    import_module("flatbuffers")  # JAX would ask for it only after the work
    run = with_guidance(model, guidance)
    check_weights(flatten(run.variables))
    path, chain = Path(path), make_chain(run, steps)
    exported = export_sampler(run, chain, sampler or ddim(), platforms)
    data, described = exported.serialize(), describe(run)
    arguments = {"key": "a typed key: jax.random.key(seed)", "samples": _SAMPLES}
    if run.num_classes is not None:
        arguments["labels"] = f"int32 [batch], classes 0 to {run.num_classes - 1}"
    avals = zip(arguments.items(), exported.in_avals, strict=True)
    manifest = {
        "file": path.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "format": "jax.export (StableHLO)",
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "requires": ["jax", "flatbuffers"],
        "call": f"call({', '.join(arguments)})",
        "arguments": {name: _array(aval, meaning) for (name, meaning), aval in avals},
        "output": _array(exported.out_avals[0], "images, pixels in [-1, 1]"),
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(run.variables)),
        **{name: described[name] for name in _OF_THE_RUN},
        **(extra or {}),
        "steps": chain.num_timesteps,
    }
    replace_file(path, data)
    write_json(_beside(path), manifest)
    return manifest


def export_sampler(
    run: DiffusionModel, schedule: NoiseSchedule, sampler: Sampler, platforms: Sequence[str]
) -> Exported:
    """`(key, samples, labels) -> images` of any batch size; no labels if the run has none.

    On a CPU the images are, to the bit, those of `p_sample_loop` jitted with the weights as an
    argument.
    """

    def sample(key, samples, labels=None):
        def noise_fn(i):
            noise = partial(sample_noise, key, i, run.shape(1), dtype=jnp.float32)
            return jax.vmap(lambda j: noise(first_sample=j)[0])(samples)

        # Constants that the compiler sees through are folded, and then it rounds otherwise.
        variables = jax.lax.optimization_barrier(run.variables)
        return p_sample_loop(
            None,
            schedule,
            guided_denoise_fn(run, variables, labels),
            run.shape(samples.shape[0]),
            sampler=sampler,
            x_T=noise_fn(schedule.num_timesteps),
            noise_fn=noise_fn,
            **run.policy,
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    integers = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch"), jnp.int32)
    arguments = [key, integers] if run.num_classes is None else [key, integers, integers]
    platforms = tuple(dict.fromkeys(platforms))  # each once
    # No paths of this machine: the same weights make the same file anywhere.
    limit: Any = jax.config
    before = limit.jax_traceback_in_locations_limit
    jax.config.update("jax_traceback_in_locations_limit", 0)
    try:
        return jax.export.export(jax.jit(sample), platforms=platforms)(*arguments)
    finally:
        jax.config.update("jax_traceback_in_locations_limit", before)


def check_export(path: PathLike) -> None:
    """Raises `ValueError` or `OSError` if a file is not what its JSON says was written."""
    path = Path(path)
    manifest = read_json(_beside(path))
    if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.get("sha256"):
        raise ValueError("its SHA-256 is not the manifest's")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _array(aval: Any, meaning: str) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"shape": shape, "dtype": str(aval.dtype), "meaning": meaning}
