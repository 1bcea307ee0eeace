"""Draw many images from a model, a batch at a time over all devices."""

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm._errors import FieldError, check_between, check_finite, check_kind, check_positive
from jax_ddpm._typing import PRNGKey
from jax_ddpm.data import load_batch
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.runs.model import class_number
from jax_ddpm.runs.programs import draw_programs, pieces
from jax_ddpm.samplers import Sampler, ddim
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal
from jax_ddpm.training.hosts import gather
from jax_ddpm.training.sharding import data_sharding, device_mesh

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
    """Draw images, float32 [num, height, width, channel], as `jax-ddpm sample` does:
    `draw(key, model, 10, labels=7)`.

    Image k of a key is the same whatever `num` and `batch_size` are.

    Args:
      key: typed key.
      model: from `load_run`, `load_diffusers` or `load_openai`.
      num, batch_size: how many images, and how many at a time.
      labels: the class of all images, or several classes, taken in turn: a number is a label, 0
        to num_classes - 1, and a text a name, where the run knows names. Default: every class
        that the training set had images of, in turn.
      guidance: scale of classifier-free guidance, 1 for none. Default: the run's.
      steps: of the reverse chain, at most the model's timesteps. Default: 50, or all if fewer.
      chain: a chain of one's own instead, such as a `respace`d one.
      sampler: the update rule. Default: `ddim()`.
      progress: called after each piece of a chain.
      watch: called with the states of the first batch: x_T, then after every piece of the chain.

    Raises `FieldError` naming the argument that does not suit the run.
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
    drawer = Drawer(run, chain, sampler or ddim(), min(num, batch_size))
    batches = drawer.batches(key, run.variables, num, turn, progress=progress, watch=watch)
    return np.concatenate(list(batches))


class Drawer:
    """Draws batches of images, by programs that are compiled once, over all devices or a mesh."""

    def __init__(
        self,
        run: DiffusionModel,
        chain: NoiseSchedule,
        sampler: Sampler,
        batch_size: int,
        mesh: Mesh | None = None,
    ) -> None:
        self._chain, self._mesh = chain, mesh or device_mesh(jax.device_count())
        # A batch that the devices divide; samples beyond the last are drawn and dropped.
        self._size = -(-batch_size // self._mesh.size) * self._mesh.size
        self._programs = draw_programs(run, chain, sampler, self._size, self._mesh)

    def batches(
        self,
        key: PRNGKey,
        weights: Any,
        num: int,
        labels: np.ndarray | None,
        *,
        first_sample: int = 0,
        progress: Callable[[Progress], None] | None = None,
        watch: Callable[[np.ndarray], None] | None = None,
    ) -> Iterator[np.ndarray]:
        """Images `first_sample` to `num` - 1 of a key, of the classes `labels` [num], float32."""
        programs, size, here = self._programs, self._size, None
        weights, starts = programs.to_devices(weights), range(first_sample, num, size)
        tell, done, total = progress or (lambda _: None), 0, self._chain.num_timesteps * len(starts)
        tell(Progress(done, total))
        for first in starts:
            state = programs.init(key, np.int32(first))
            if labels is not None:
                here = np.resize(labels[first : first + size], size)
                here = load_batch(here, np.arange(size), data_sharding(self._mesh))
            if watch and first == 0:
                watch(gather(state.x_t))
            for length in pieces(self._chain):
                state = programs.advance(key, weights, here, state, np.int32(first), length)
                jax.block_until_ready(state)
                if watch and first == 0:
                    watch(gather(state.x_t))
                done += length
                tell(Progress(done, total))
            yield gather(state.x_t)[: num - first]


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
    given, names = np.atleast_1d(np.asarray(labels)), run.class_names
    if given.dtype.kind == "U":
        numbers = [class_number(name, names) for name in given.tolist()]
        if None in numbers:
            known = ", ".join((names or ())[:20]) or "numbers, as the run knows no names"
            unknown = given.tolist()[numbers.index(None)]
            raise FieldError("labels", f"expected {known}, got {unknown!r}")
        given = np.asarray(numbers)
    if not given.size or given.ndim > 1 or given.dtype.kind not in "iu":
        raise FieldError("labels", f"expected whole numbers, got {given.tolist()}")
    check_between("labels", given, 0, run.num_classes - 1)
    return np.resize(given.astype(np.int32), num)


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
    if steps is None:
        return run.chain(run.timestep_respacing or min(50, run.schedule.num_timesteps))
    return run.chain(steps)


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
