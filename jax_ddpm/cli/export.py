"""`jax-ddpm export`: the whole sampler, weights included, as one StableHLO file.

The file is a serialized `jax.export`. JAX and the package flatbuffers run it, without this
library, on any platform that it was lowered for and in batches of any size:

    sampler = jax.export.deserialize(bytearray(open("sampler.jaxexport", "rb").read()))
    images = sampler.call(key, samples)           # of a model without classes
    images = sampler.call(key, samples, labels)   # of one with classes

`samples` int32 [batch] are numbers, and a sample's number decides its noise (see `noise`): for
one key, 0, 1, 2, … are the pictures that `jax-ddpm sample` draws.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.export import Exported

from jax_ddpm import __version__
from jax_ddpm.cli.config import ExportConfig, UsageError, check_out, writing
from jax_ddpm.cli.draw import guided_denoise_fn
from jax_ddpm.cli.runs import Run
from jax_ddpm.cli.sample import load_chain, make_sampler
from jax_ddpm.interop.scheduler import Scheduler, scheduler_config
from jax_ddpm.io.files import replace_file
from jax_ddpm.io.json import write_json
from jax_ddpm.noise import sample_noise
from jax_ddpm.samplers import Sampler
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.schedule import NoiseSchedule

__all__ = ["export", "export_sampler"]


def export(config: ExportConfig) -> None:
    """Export as `config` says, and write the file and its manifest."""
    check_out(config.out, ".jaxexport")
    if not config.platforms:
        raise UsageError("--platforms: expected at least one, got none")
    sampler = make_sampler(config)
    import_module("flatbuffers")  # JAX would ask for it only after the work
    # No paths of this machine: the same weights make the same file anywhere.
    jax.config.update("jax_traceback_in_locations_limit", 0)
    run, chain = load_chain(config)
    config = replace(config, steps=chain.num_timesteps)
    exported = export_sampler(run, chain, sampler, config.platforms)
    data = exported.serialize()
    manifest = {
        "file": config.out.name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        **_manifest(config, run, exported),
    }
    beside = config.out.with_name(f"{config.out.name}.json")
    with writing("--out", config.out):
        replace_file(config.out, data)
    with writing("--out", beside):
        write_json(beside, manifest)
    print(
        f"wrote {config.out}: {len(data) / 1e6:,.1f} MB, {config.steps} {config.sampler} steps, "
        f"for {', '.join(exported.platforms)}\nwrote {beside}, which says what it is\n\n"
        "next, with nothing but `pip install jax flatbuffers`:\n"
        f'  sampler = jax.export.deserialize(bytearray(open("{config.out}", "rb").read()))\n'
        f"  images = sampler.{manifest['call']}\nwhere"
    )
    for name, argument in manifest["arguments"].items():
        print(f"  {name:<10}{argument['meaning']}")


def export_sampler(
    run: Run, schedule: NoiseSchedule, sampler: Sampler, platforms: Sequence[str]
) -> Exported:
    """`(key, samples, labels) -> images` of any batch size; no labels if the run has none.

    On a CPU the images are, to the bit, those of `p_sample_loop` jitted with the weights as an
    argument.
    """

    def sample(key, samples, labels=None):
        def noise_fn(i):
            def draw(j):
                shape = (1, *run.image_shape)
                return sample_noise(key, i, shape, first_sample=j, dtype=jnp.float32)[0]

            return jax.vmap(draw)(samples)

        # Constants that the compiler sees through are folded, and then it rounds otherwise.
        variables = jax.lax.optimization_barrier(run.pretrained.variables)
        return p_sample_loop(
            None,
            schedule,
            guided_denoise_fn(run, variables, labels),
            (samples.shape[0], *run.image_shape),
            sampler=sampler,
            x_T=noise_fn(schedule.num_timesteps),
            noise_fn=noise_fn,
            **run.pretrained.policy,
        )

    key = jax.eval_shape(lambda: jax.random.key(0))
    integers = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch"), jnp.int32)
    arguments = [key, integers] if run.num_classes is None else [key, integers, integers]
    platforms = tuple(dict.fromkeys(platforms))  # each once
    return jax.export.export(jax.jit(sample), platforms=platforms)(*arguments)


def _manifest(config: ExportConfig, run: Run, exported: Exported) -> dict[str, Any]:
    meaning = {
        "key": "a typed key: jax.random.key(seed)",
        "samples": "int32 [batch], each sample's number, which decides its noise",
    }
    if run.num_classes is not None:
        meaning["labels"] = f"int32 [batch], classes 0 to {run.num_classes - 1}"
    sizes = [int(np.size(leaf)) for leaf in jax.tree.leaves(run.pretrained.variables)]
    return {
        "format": "jax.export (StableHLO)",
        "calling_convention_version": exported.calling_convention_version,
        "platforms": list(exported.platforms),
        "requires": ["jax", "flatbuffers"],
        "call": f"call({', '.join(meaning)})",
        "arguments": {
            name: _describe(aval, text)
            for (name, text), aval in zip(meaning.items(), exported.in_avals, strict=True)
        },
        "output": _describe(exported.out_avals[0], "images, pixels in [-1, 1]"),
        "parameters": sum(sizes),
        "sampler": config.sampler,
        "eta": config.eta,
        "order": config.order,
        "stochastic": config.stochastic,
        "steps": config.steps,
        "scheduler": scheduler_config(Scheduler(*run.pretrained[2:])),
        "num_classes": run.num_classes,
        "null_label": run.null_label,
        "guidance": run.guidance,
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__},
    }


def _describe(aval: Any, text: str) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"shape": shape, "dtype": str(aval.dtype), "meaning": text}
