"""Figures for a model or for samples, from real images.

Samples are compared with real images by the features of a network: FID and its kin by Inception's,
other distances by those of a small classifier (`evaluation`). Where there are classes, the first
1,000 samples are also judged by a support vector machine that was trained on real images (at most
10,000 of them): how often does it name the class that was asked for? Beside it stands how often it
names the class of real images that it has not seen. Pixels of 8 bits also have a likelihood: the
bound of `bits_per_dim`.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from importlib import import_module
from typing import Any, Literal

import jax
import numpy as np

from jax_ddpm import __version__
from jax_ddpm._errors import Field, FieldError, check_between, check_positive, check_whole
from jax_ddpm.data import Dataset, to_bytes, to_float
from jax_ddpm.evaluation.reference import Reference
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import Drawer, make_chain, with_guidance
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.runs.recording import compared, drawn
from jax_ddpm.runs.references import open_reference
from jax_ddpm.runs.run import PathLike, matched
from jax_ddpm.runs.samples import Samples, open_kept, open_samples, resumed
from jax_ddpm.runs.scoring import is_8_bit, score
from jax_ddpm.samplers import Sampler, ancestral
from jax_ddpm.schedule import warn_of_signal
from jax_ddpm.training.hosts import run_on_all

_HELD_OUT = 0.2
_JUDGED_BY = 10_000
_JUDGED = 1000
_OF_EACH = 5
_SCORED = 1000


def evaluate(
    model: DiffusionModel,
    data: Dataset | None = None,
    *,
    num: int = 1000,
    steps: int | None = None,
    sampler: Sampler | None = None,
    guidance: float | None = None,
    seed: int = 0,
    batch_size: int = 256,
    inception: PathLike | None = None,
    reference: PathLike | None = None,
    statistics: PathLike | None = None,
    folder: PathLike | None = None,
    num_scored: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Draw from a run, and measure: how near are its samples to real images, do they show what was
    asked for, and how likely are real images under the model?

    | figure | where |
    |---|---|
    | `fid`, `fid_64`, `fid_192`, `fid_768`, `kid`, `inception_score` | with Inception's weights |
    | `classifier_frechet_distance`, `classifier_kernel_distance` | without them |
    | `precision`, `recall`, `nearest`, `nearest_real`, `nearer_than_1_percent` | with images |
    | `held_out`: the same figures of real images, a floor | with images |
    | `agreement`, `svc_held_out`, `judged` | of a run with classes, with images |
    | `bits_per_dim` | with images of 8 bits |
    | `left_out`: why, by the figure's name | always: of what cannot be had |
    | `steps`, `recipe` | always: all that is needed to measure again |

    Classes are matched by name where both sides have names, or those of one are numbers, else by
    number. Drawn are those learned that the images show, or all if none is; it warns of the others.

    What ends in `_std` is a spread. The names are explained in `evaluation`.

    Args:
      model: the model to evaluate, from `load_run`, `load_diffusers` or `load_openai`.
      data: the images that it learned. None: `reference` stands for them.
      num: how many samples are drawn; 0 for none, and then no figures of them.
      steps: of the reverse chain. Default: all.
      sampler: the update rule. Default: `ancestral()`.
      guidance: scale of classifier-free guidance. Default: the run's.
      seed: of the samples, and of the split of the data.
      batch_size: samples drawn at a time.
      inception: the file of Inception's weights, as `load_inception` reads it, for RGB images.
        Default: what the environment variable JAX_DDPM_INCEPTION says, or else the features of a
        small classifier that learns half of `data`.
      reference: a .npz of `mu` and `sigma` of Inception's features, in place of those of `data`.
      statistics: a .npz that `mu` and `sigma` of Inception's features of `data` are written to.
      folder: where samples are kept as they are drawn. Called again with the same arguments, a
        draw that was stopped resumes.
      num_scored: how many images are scored in bits per dimension, 0 for none. Default: `num`, at
        most 1,000, where they are of 8 bits.
      progress: called as the work proceeds.

    Raises:
      FieldError: naming what does not suit the run.
    """
    check_positive(steps=steps, batch_size=batch_size)
    check_between("num", num, 0)
    check_between("num_scored", num_scored or 0, 0)
    key, seed, left_out = seed_key(seed), int(seed), {}
    run, sampler = with_guidance(model, guidance), sampler or ancestral()
    image_shape = run.shape(1)[1:]
    chain = make_chain(run, run.schedule.num_timesteps if steps is None else steps)
    warn_of_signal(chain)
    if data is not None:
        _check(data, image_shape, "the run's")
    there, labels, asked = {label: label for label in run.drawn}, None, None
    if data is not None and data.labels is not None and run.num_classes is not None:
        there = matched(run.class_names, run.drawn, data)
    turn = [*there] or [*run.drawn]
    of_samples = {"reference": reference, "statistics": statistics, "folder": folder}
    for name, value in of_samples.items() if num == 0 else ():
        if value is not None:
            raise FieldError("num", "expected more than 0 with ", Field(name), ", got 0")
    scored = min(num, _SCORED) if num_scored is None else num_scored
    no_label = (data is not None and data.labels is None) or not there and run.null_label is None
    if data is None or not is_8_bit(data) or (run.num_classes and no_label):
        expected = "expected images of 8 bits, with labels where the model has classes"
        if num_scored:
            raise FieldError("num_scored", f"{expected}, got {num_scored} to score")
        if scored and data is not None:
            left_out["bits_per_dim"] = f"{expected}, got others"
        scored = 0
    if not num and not scored:
        raise FieldError("num", "expected more than 0, since no images of 8 bits are scored, got 0")
    made: dict[str, Any] = {"num": num, **drawn(run, chain, sampler), "seed": seed}
    figures: dict[str, Any] = {"steps": chain.num_timesteps}
    if num:
        kept = []
        if folder is not None:
            kept = open_kept(folder, made | {"class_names": run.class_names, "labels": turn})
        target = open_reference(
            image_shape, data, inception, reference, statistics, num, seed, progress
        )
        if run.num_classes is not None:
            labels = np.resize(np.asarray(turn or [run.null_label], np.int32), num)
            asked = np.asarray([there.get(k, -1) for k in labels.tolist()]) if turn else None
        drawer = Drawer(run, chain, sampler, min(num, batch_size))
        weights = run.variables
        draw = partial(drawer.batches, key, weights, num, labels, progress=progress)
        batches = map(to_bytes, draw())
        if folder is not None:
            batches = resumed(folder, kept, num, draw)
        figures |= _measure(target, batches, num, data, asked, seed, left_out)
        made |= compared(target, data, reference)
    if data is not None and scored:
        if data.labels is not None:
            here = {theirs: label for label, theirs in there.items()}
            none = -1 if run.null_label is None else run.null_label
            of_run = [here.get(each, none) for each in data.labels.tolist()]
            data = data._replace(labels=np.asarray(of_run, np.int32))
        figures["bits_per_dim"] = score(key, run, data, scored, seed, progress)
        made["scored"] = f"{min(scored, len(data.images)):,} images of {data.source}"
    versions = {"jax_ddpm": __version__, "jax": jax.__version__}
    return figures | {"left_out": left_out, "recipe": {**made, "versions": versions}}


def evaluate_samples(
    samples: PathLike,
    data: Dataset | None = None,
    *,
    num: int | None = None,
    seed: int = 0,
    inception: PathLike | None = None,
    reference: PathLike | None = None,
    statistics: PathLike | None = None,
    range: Literal["unit", "signed"] | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """The figures of `evaluate` for samples that somebody drew.

    Args:
      samples: a folder of `evaluate`, or what `load_dataset` reads: a .npz or .npy, a folder or an
        archive of pictures.
      data: the real images. None: `reference` stands for them.
      num: how many of them are measured, the first. Default: all.
      range: of samples of others in a float array, as `Preparation` has it.
      seed, inception, reference, statistics, progress: as in `evaluate`.

    Raises:
      FieldError: naming what does not fit.
    """
    check_positive(num=num)
    check_whole("seed", seed, 0)
    seed = int(seed)
    found = run_on_all(lambda: open_samples(samples, range))
    count = found.num if num is None else num
    if count > found.num:
        raise FieldError("num", f"expected at most {found.num:,}, the samples, got {count:,}")
    if data is not None:
        _check(data, found.image_shape, "the samples")
    target = open_reference(
        found.image_shape, data, inception, reference, statistics, count, seed, progress
    )
    labels, left_out = None, {}
    if data is not None and data.labels is not None and found.labels is not None:
        there = matched(found.class_names, np.unique(found.labels).tolist(), data, some=True)
        labels = np.asarray([there.get(each, -1) for each in found.labels[:count].tolist()])
    digest = hashlib.sha256()
    batches = _told(found, count, digest.update, progress)
    figures = _measure(target, batches, count, data, labels, seed, left_out)
    made = {
        "samples": f"{count:,} of the {found.num:,} in {samples}, SHA-256 {digest.hexdigest()}",
        **found.recipe,
        "split seed": seed,
        **compared(target, data, reference),
        "versions": {"jax_ddpm": __version__, "jax": jax.__version__},
    }
    return {"num": count} | figures | {"left_out": left_out, "recipe": made}


def _measure(
    target: Reference,
    batches: Iterable[np.ndarray],
    total: int,
    data: Dataset | None,
    labels: np.ndarray | None,
    seed: int,
    left_out: dict[str, str],
) -> dict[str, Any]:
    """Distances, and label agreement of the first samples; what cannot be had is `left_out`."""
    if data is None or data.labels is None or labels is None:
        labels, left_out["agreement"] = None, "the samples or the images have no classes"
    elif labels.max() < 0:
        labels, left_out["agreement"] = None, "the samples and the images have no class in common"
    else:
        import_module("sklearn")  # before the work
    judged: list[np.ndarray] = []

    def passing() -> Iterator[np.ndarray]:
        for batch in batches:
            if labels is not None and sum(map(len, judged)) < _JUDGED:
                judged.append(batch)
            yield batch

    stream = passing()
    figures = target.measure(stream, total)
    for _ in stream:  # what is left to be judged, or to be kept
        pass
    if target.floor:
        figures["held_out"] = target.floor
    kernel = "kid" if "fid" in figures else "classifier_kernel_distance"
    for name in (kernel, "precision", "recall") if target.learned is not None else ():
        if name not in figures:
            left_out[name] = "there are too few samples or images"
    if labels is not None and data is not None:
        samples, labels = to_float(np.concatenate(judged)[:_JUDGED]), labels[:_JUDGED]
        samples, labels = samples[labels >= 0], labels[labels >= 0]
        try:
            agreement, held_out = label_agreement(data, samples, labels, seed)
            figures |= {"agreement": agreement, "svc_held_out": held_out, "judged": len(samples)}
        except FieldError as error:
            left_out["agreement"] = str(error)
    return figures


def _told(
    samples: Samples,
    count: int,
    digest: Callable[[bytes], None],
    progress: Callable[[Progress], None] | None,
) -> Iterator[np.ndarray]:
    """The first `count`, which `digest` and `progress` are told of."""
    done = 0
    for batch in samples.batches():
        if done >= count:
            return
        images = batch[: count - done]
        digest(images.tobytes())
        yield images
        done += len(images)
        if progress:
            progress(Progress(done, count, what="samples"))


def _check(data: Dataset, shape: tuple[int, int, int], others: str) -> None:
    """Raises `FieldError` unless these are images of this shape, which is that of `others`."""
    data.check()
    if data.image_shape != shape:
        raise FieldError("data", f"expected images of {shape}, as {others}, got {data.image_shape}")


def label_agreement(
    data: Dataset, samples: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """How often an SVC names the label of a sample, and of a real image held out from it; raises
    `FieldError` where it cannot learn the labels and be tried on others."""
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    assert data.labels is not None
    chosen = np.arange(len(data.labels))
    if len(chosen) > _JUDGED_BY:
        # Some of each class first, or none of a rare one could be held out.
        order = np.random.default_rng(seed).permutation(len(chosen))
        sorts = [order[data.labels[order] == label] for label in np.unique(data.labels)]
        first = np.concatenate([each[:_OF_EACH] for each in sorts])
        rest = np.setdiff1d(order, first, assume_unique=True)
        chosen = np.sort(np.concatenate([first, rest])[:_JUDGED_BY])
    labels_of = data.labels[chosen]
    counts = np.unique(labels_of, return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2 or _HELD_OUT * len(chosen) <= len(counts) - 1:
        got = f"{len(chosen):,} images in {len(counts):,} classes, {counts.min():,} in the smallest"
        expected = "an SVC learns two classes or more, and a fifth is held out, some of each class"
        raise FieldError(None, f"{expected}; there are {got}")
    # scikit-learn takes seeds of 32 bits.
    state: Any = seed if seed < 2**32 else np.random.RandomState(np.random.MT19937(seed))
    flat = to_float(data.whole(chosen)).reshape(len(chosen), -1)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        flat, labels_of, test_size=_HELD_OUT, random_state=state, stratify=labels_of
    )
    judge = SVC(C=10).fit(seen, seen_labels)
    agreement = float(judge.score(samples.reshape(len(samples), -1), labels))
    return agreement, float(judge.score(unseen, unseen_labels))
