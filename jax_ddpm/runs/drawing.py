"""Draw images from a model, a batch at a time over all devices; or export the sampler."""

import hashlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_ddpm._errors import FieldError, check_between, check_finite, check_kind, check_positive
from jax_ddpm._typing import PRNGKey
from jax_ddpm.data import load_batch
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import check_weights, flatten
from jax_ddpm.io.files import read_json, replace_file, write_json
from jax_ddpm.noise import sample_noise
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.runs.model import PathLike, class_number, describe
from jax_ddpm.runs.programs import draw_programs, guided_denoise_fn, pieces
from jax_ddpm.samplers import Sampler, ddim
from jax_ddpm.sampling import p_sample_loop
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal
from jax_ddpm.training.hosts import gather
from jax_ddpm.training.sharding import data_sharding, device_mesh

_PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
Labels = int | str | Sequence[int] | Sequence[str] | np.ndarray


def draw(
    key: PRNGKey,
    model: DiffusionModel,
    num: int,
    *,
    labels: Labels | None = None,
    guidance: float | None = None,
    steps: int | None = None,
    chain: NoiseSchedule | None = None,
    sampler: Sampler | None = None,
    batch_size: int = 256,
    progress: Callable[[Progress], None] | None = None,
    watch: Callable[[np.ndarray], None] | None = None,
) -> np.ndarray:
    """Sample images, float32 [num, height, width, channel] in [-1, 1], as `jax-ddpm sample` does.

    Image k of a key is the same whatever `num` and `batch_size` are.

    Args:
      key: typed key.
      model: from `load_run`, `load_model`, `load_diffusers` or `load_openai`.
      num, batch_size: the number of images, in all and at a time.
      labels: the class of all images, or several classes in turn, as numbers from 0 or as names
        that the run knows. Default: all classes that occurred in training, in turn.
      guidance: scale of classifier-free guidance (Ho & Salimans 2022), 1 for none. Default: the
        model's.
      steps: of the reverse chain, at most T. Default: the model's `timestep_respacing`, or else 50,
        or T if smaller.
      chain: the reverse chain itself, such as from `respace`, instead of `steps`.
      sampler: the update rule. Default: `ddim()`.
      progress: a callback, given a `Progress` after every piece of a chain.
      watch: a callback, given x_t of the first batch: x_T, then after every piece of the chain.

    Raises:
      FieldError: an argument does not fit the model, such as labels of one without classes.

    Examples:
      >>> model = runs.load_run("runs/digits")
      >>> sevens = runs.draw(jax.random.key(0), model, 3, labels=7, guidance=3.0, steps=2)
      >>> sevens.shape
      (3, 8, 8, 1)
    """
    check_positive(num=num, batch_size=batch_size)
    if chain is not None and steps is not None:
        raise FieldError("steps", "cannot be given with chain")
    run = with_guidance(model, guidance)
    chain = make_chain(run, steps) if chain is None else chain
    check_kind("chain", chain, NoiseSchedule, "model.chain(20)")
    warn_of_signal(chain)
    turn = labels_in_turn(run, num, labels)
    if labels is not None and turn is not None:
        warn_of_labels(run, turn)
    batches = make_drawer(run, chain, sampler or ddim(), min(num, batch_size))
    drawn = batches(key, run.variables, num, turn, progress=progress, watch=watch)
    return np.concatenate([*drawn])


def make_drawer(
    run: DiffusionModel,
    chain: NoiseSchedule,
    sampler: Sampler,
    batch_size: int,
    mesh: Mesh | None = None,
) -> Callable[..., Iterator[np.ndarray]]:
    """What draws batches, by programs that are compiled once, over all devices or a mesh:

    `batches(key, weights, num, labels, first_sample=0, progress=None, watch=None)` are images
    `first_sample` to `num` - 1 of a key, of the classes `labels` [num], float32.
    """
    mesh = mesh or device_mesh(jax.device_count())
    # A batch that the devices divide; samples beyond the last are drawn and dropped.
    size = -(-batch_size // mesh.size) * mesh.size
    programs = draw_programs(run, chain, sampler, size, mesh)

    def batches(key, weights, num, labels, first_sample=0, progress=None, watch=None):
        weights, starts = programs.to_devices(weights), range(first_sample, num, size)
        tell, here = progress or (lambda _: None), None
        done, total = 0, chain.num_timesteps * len(starts)
        tell(Progress(done, total))
        for first in starts:
            if labels is not None:
                here = np.resize(labels[first : first + size], size)
                here = load_batch(here, np.arange(size), data_sharding(mesh))
            state = programs.init(key, np.int32(first))
            if watch and first == 0:
                watch(gather(state.x_t))
            for length in pieces(chain):
                state = programs.advance(key, weights, here, state, np.int32(first), length)
                jax.block_until_ready(state)
                if watch and first == 0:
                    watch(gather(state.x_t))
                done += length
                tell(Progress(done, total))
            yield gather(state.x_t)[: num - first]

    return batches


def labels_in_turn(
    run: DiffusionModel, num: int, labels: Labels | None = None
) -> np.ndarray | None:
    """Labels of `num` images, in turn: these, or all that were learned. None without classes."""
    if run.num_classes is None:
        if labels is not None:
            raise FieldError("labels", "expected none: the model has no classes")
        return None
    if labels is None:
        return np.resize(np.asarray(run.drawn or [run.null_label], np.int32), num)
    given = np.atleast_1d(np.asarray(labels))
    if given.dtype.kind == "U":
        given = np.asarray([_label_of(name, run.class_names) for name in given.tolist()])
    if not given.size or given.ndim > 1 or given.dtype.kind not in "iu":
        raise FieldError("labels", f"expected whole numbers, got {given.tolist()}")
    check_between("labels", given, 0, run.num_classes - 1)
    return np.resize(given.astype(np.int32), num)


def _label_of(name: str, names: Sequence[str] | None) -> int:
    number = class_number(name, names)
    if number is None:
        alike = {each.casefold(): each for each in names or ()}
        close = get_close_matches(name.casefold(), alike, n=1)
        meant = f"; did you mean {alike[close[0]]!r}?" if close else ""
        known = ", ".join((names or ())[:20]) or "a number, as the model knows no names"
        raise FieldError("labels", f"expected {known}, got {name!r}{meant}")
    return number


def warn_of_labels(run: DiffusionModel, labels: np.ndarray) -> None:
    """Warn of labels that were not learned, or whose class has another number for a name."""
    for label in np.unique(labels).tolist():
        name = run.class_names[label] if run.class_names else str(label)
        if label not in run.drawn:
            warnings.warn(f"labels: no image of class {name} was learned", stacklevel=4)
        if name.isdecimal() and int(name) != label:
            warnings.warn(f"labels: label {label} is the class named {name!r}", stacklevel=4)


def make_chain(run: DiffusionModel, steps: int | None = None) -> NoiseSchedule:
    """The run's chain of `steps`, with its spacing. Default: that of its checkpoint, where it says
    one, otherwise 50 steps, or all if fewer."""
    default = run.timestep_respacing or min(50, run.schedule.num_timesteps)
    return run.chain(default if steps is None else steps)


def with_guidance(run: DiffusionModel, guidance: float | None) -> DiffusionModel:
    """The run under this scale of guidance; as it is where that is None or the run's own."""
    check_kind("model", run, DiffusionModel, "load_run(folder)")
    if guidance is None or guidance == run.guidance or (guidance == 1 and not run.num_classes):
        return run
    check_finite("guidance", guidance)
    if run.null_label is None or not run.drawn:
        why = "the model has no classes, or no trained label that stands for none"
        raise FieldError("guidance", why)
    if run.drawn[-1] == run.null_label:
        last = f"guidance: the last label, {run.null_label}, is taken for the null label"
        warnings.warn(last, stacklevel=3)
        run = run._replace(num_classes=run.null_label)
    return run._replace(guidance=guidance)


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
    """Write the whole sampler, weights included, as one StableHLO file, a serialized `jax.export`.

    JAX and the package flatbuffers run it, without this library. On a CPU its samples are those of
    `p_sample_loop`, jitted with the weights as an argument, to the bit.

    Args:
      path: the file; its description, which is returned, goes to `path` + ".json".
      model, steps, guidance, sampler: as in `draw`.
      platforms: where it will run, of "cpu", "cuda", "rocm" and "tpu".
      extra: more entries for the description.

    Raises:
      FieldError: an argument does not fit the model, or a weight is not finite.

    Examples:
      >>> from pathlib import Path
      >>> model = runs.load_run("runs/digits")
      >>> description = runs.export("digits.jaxexport", model, steps=2, platforms=["cpu"])
      >>> sampler = jax.export.deserialize(bytearray(Path("digits.jaxexport").read_bytes()))
      >>> sample, label = np.arange(3), np.full(3, 7)  # label: only of a model with classes
      >>> sampler.call(jax.random.key(0), sample, label).shape
      (3, 8, 8, 1)
    """
    if not all(each in _PLATFORMS for each in platforms):
        raise FieldError("platforms", f"expected some of {_PLATFORMS}, got {platforms!r}")
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

    arguments = {
        "key": "a typed key: jax.random.key(seed)",
        "samples": "int32 [batch], each sample's number, which decides its noise",
    }
    if run.num_classes is not None:
        arguments["labels"] = f"int32 [batch], classes 0 to {run.num_classes - 1}"
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.ShapeDtypeStruct(jax.export.symbolic_shape("batch"), jnp.int32)
    make = jax.export.export(jax.jit(sample), platforms=platforms)
    limit = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, limit)
    jax.config.update(limit, 0)  # no paths of this machine: the same file anywhere
    try:
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
