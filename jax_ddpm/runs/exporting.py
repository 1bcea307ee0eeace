"""The whole sampler, weights included, as one StableHLO file that runs without this library.

JAX and the package flatbuffers run the file, a serialized `jax.export`, in batches of any size.
On a CPU they are, to the bit, those of `p_sample_loop` jitted with the weights as an argument.

    sampler = jax.export.deserialize(bytearray(open("sampler.jaxexport", "rb").read()))
    images = sampler.call(key, samples)           # of a model without classes
    images = sampler.call(key, samples, labels)   # of one with classes

A sample's number, in `samples` int32 [batch], decides its noise: for one key, 0, 1, 2, … are the
pictures of `draw`.
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

from jax_ddpm._errors import check_choice
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import check_weights, flatten
from jax_ddpm.io.files import read_json, replace_file, write_json
from jax_ddpm.noise import sample_noise
from jax_ddpm.runs.drawing import make_chain, with_guidance
from jax_ddpm.runs.model import PathLike, describe
from jax_ddpm.runs.programs import guided_denoise_fn
from jax_ddpm.samplers import Sampler, ddim
from jax_ddpm.sampling import p_sample_loop

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


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
      model, steps, guidance, sampler: as in `draw`.
      platforms: where it will run, of "cpu", "cuda", "rocm" and "tpu".
      extra: also goes into the JSON.

    Raises `FieldError` naming what is wrong, or a weight that is not finite, and `OSError`.
    """
    for each in platforms:
        check_choice("platforms", each, _PLATFORMS)
    import_module("flatbuffers")  # JAX would ask for it only after the work
    run = with_guidance(model, guidance)
    check_weights(flatten(run.variables))
    path, chain = Path(path), make_chain(run, steps)

    def sample(key, samples, labels=None):
        def noise_fn(i):
            noise = partial(sample_noise, key, i, run.shape(1), dtype=jnp.float32)
            return jax.vmap(lambda j: noise(first_sample=j)[0])(samples)

        # Constants that the compiler sees through are folded, and then it rounds otherwise.
        variables = jax.lax.optimization_barrier(run.variables)
        denoise_fn, shape = guided_denoise_fn(run, variables, labels), run.shape(samples.shape[0])
        options: Any = {"sampler": sampler or ddim(), "noise_fn": noise_fn, **run.policy}
        x_T = noise_fn(chain.num_timesteps)
        return p_sample_loop(None, chain, denoise_fn, shape, x_T=x_T, **options)

    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch"), jnp.int32)
    arguments = {
        "key": "a typed key: jax.random.key(seed)",
        "samples": "int32 [batch], each sample's number, which decides its noise",
    }
    if run.num_classes is not None:
        arguments["labels"] = f"int32 [batch], classes 0 to {run.num_classes - 1}"
    limit = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, limit)
    jax.config.update(limit, 0)  # no paths of this machine: the same file anywhere
    try:
        make = jax.export.export(jax.jit(sample), platforms=platforms)
        exported = make(key, *[batch] * (len(arguments) - 1))
    finally:
        jax.config.update(limit, before)
    data, output = exported.serialize(), exported.out_avals[0]
    manifest = {
        **describe(run),
        "format": "jax.export (StableHLO)",
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "platforms": list(exported.platforms),
        "requires": ["jax", "flatbuffers"],
        "call": f"call({', '.join(arguments)})",
        "arguments": arguments,
        "output": f"{output.dtype} [{', '.join(map(str, output.shape))}], pixels in [-1, 1]",
        "parameters": sum(int(np.size(leaf)) for leaf in jax.tree.leaves(run.variables)),
        **(extra or {}),
        "steps": chain.num_timesteps,
    }
    replace_file(path, data)
    write_json(Path(f"{path}.json"), manifest)
    return manifest


def check_export(path: PathLike) -> None:
    """Raises `ValueError` or `OSError` if a file is not what its JSON says was written."""
    manifest = read_json(Path(f"{path}.json"))
    if hashlib.sha256(Path(path).read_bytes()).hexdigest() != manifest.get("sha256"):
        raise ValueError("its SHA-256 is not the manifest's")
