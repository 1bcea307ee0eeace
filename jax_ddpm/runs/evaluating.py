"""Figures for a model or for samples, from real images: what draws, compares, records and reports.

Samples are compared with real images by the features of a network: FID and its kin by Inception's,
other distances by those of a small classifier (`evaluation`). Where there are classes, the first
1,000 samples are also judged by a support vector machine that was trained on real images: how often
does it name the class that was asked for? Pixels of 8 bits also have a likelihood: the bound of
`bits_per_dim`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jax_ddpm import __version__
from jax_ddpm._errors import (
    Field,
    FieldError,
    check_between,
    check_positive,
    check_whole,
    described,
)
from jax_ddpm.data import Dataset, to_bytes, to_float
from jax_ddpm.evaluation import FeatureNetwork, load_inception, save_statistics
from jax_ddpm.evaluation.features import VARIABLE, WHERE, over_devices
from jax_ddpm.evaluation.reference import reference_of_file, reference_of_images
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import flatten
from jax_ddpm.likelihood import bits_per_dim
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import Drawer, make_chain, with_guidance
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.runs.model import PathLike, matched
from jax_ddpm.runs.samples import open_kept, open_samples, resumed
from jax_ddpm.samplers import Sampler, ancestral
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal
from jax_ddpm.training.hosts import run_on_all, run_on_writer

Tell = Callable[[Progress], None] | None

_JUDGED_BY, _HELD_OUT, _OF_EACH = 10_000, 0.2, 5
_JUDGED, _CLASSES, _NUMBERS = 1000, 100, 4096
"""An SVC has a machine for each pair of classes, and kernels of all numbers of an image."""
_SCORED, _BATCH = 1000, 250
_MANY = 10_000
_FEW = 100
"""Where precision and recall are of fewer images, the balls around them, as wide as the third
neighbour is far, cover too much: of 15 digits noise has a precision of up to 80 % and held-out
digits of 100 %. From 50 on noise has none, and from 100 on held-out digits have about 90 %."""


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
    agreement: bool = True,
    progress: Tell = None,
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
    | `left_out`: why, by the figure's name; `notes` | always: what cannot be had, or says little |
    | `num`, `steps`, `recipe` | always: all that is needed to measure again |

    What ends in `_std` is a spread. The names are explained in `evaluation`. Classes are matched by
    name where both sides have names, or those of one are numbers, else by number. Drawn are those
    learned that the images show, or all if none is; it warns of the others. A `FieldError` names
    what does not suit the run.

    Args:
      model: from `load_run`, `load_diffusers` or `load_openai`.
      data: the images that it learned. None: `reference` stands for them.
      num: how many samples are drawn; 0 for none, and then no figures of them.
      steps: of the reverse chain. Default: all.
      sampler: the update rule. Default: `ancestral()`.
      guidance: scale of classifier-free guidance. Default: the run's.
      seed: of the samples, and of the split of the data.
      batch_size: samples drawn at a time.
      inception: the file of Inception's weights, for RGB images, as `load_inception` reads it.
        Default: that of JAX_DDPM_INCEPTION, or else a small classifier learns half of `data`.
      reference: a .npz of `mu` and `sigma` of Inception's features, in place of those of `data`.
      statistics: a .npz that `mu` and `sigma` of Inception's features of `data` are written to.
      folder: where samples are kept as they are drawn. Called again with the same arguments, a
        draw that was stopped resumes.
      num_scored: how many images are scored in bits per dimension, 0 for none. Default: `num`, at
        most 1,000, where they are of 8 bits.
      agreement: whether a support vector machine judges the classes of samples: of at most 4,096
        numbers an image and 100 classes.
      progress: called as the work proceeds.
    """
    check_positive(steps=steps, batch_size=batch_size)
    check_between("num", num, 0)
    check_between("num_scored", num_scored or 0, 0)
    key, seed = seed_key(seed), int(seed)
    run, sampler = with_guidance(model, guidance), sampler or ancestral()
    chain = make_chain(run, run.schedule.num_timesteps if steps is None else steps)
    warn_of_signal(chain)
    _check(data, run.shape(1)[1:], "the run's")
    there = {label: label for label in run.drawn}
    if data is not None and data.labels is not None and run.num_classes is not None:
        there = matched(run.class_names, run.drawn, data)
    turn = [*there] or [*run.drawn]
    scored, unscored = min(num, _SCORED) if num_scored is None else num_scored, {}
    no_label = (data is not None and data.labels is None) or not there and run.null_label is None
    if data is None or not _is_8_bit(data) or (run.num_classes and no_label):
        expected = "expected images of 8 bits, with labels where the model has classes"
        if num_scored:
            raise FieldError("num_scored", f"{expected}, got {num_scored} to score")
        if scored and data is not None:
            unscored["bits_per_dim"] = f"{expected}, got others"
        scored = 0
    if not num and (not scored or reference or statistics or folder):
        problem = "expected more than 0: without samples there are only bits per dimension, got 0"
        raise FieldError("num", problem)
    report: dict[str, Any] = {"left_out": {}, "notes": []}
    made, how = drawn(run, chain, sampler) | {"seed": seed}, {}
    if num:
        labels, asked, kept = None, None, []
        if folder is not None:
            kept = open_kept(folder, made | {"class_names": run.class_names, "labels": turn})
        if run.num_classes is not None:
            labels = np.resize(np.asarray(turn or [run.null_label], np.int32), num)
            asked = np.asarray([there.get(k, -1) for k in labels.tolist()]) if turn else None
        drawer = Drawer(run, chain, sampler, min(num, batch_size))
        draw = partial(drawer.batches, key, run.variables, num, labels, progress=progress)
        batches = map(to_bytes, draw()) if folder is None else resumed(folder, kept, num, draw)
        options: Any = {"inception": inception, "reference": reference, "statistics": statistics}
        options |= {"seed": seed, "agreement": agreement, "progress": progress}
        report, how = _measure(run.shape(1)[1:], batches, num, asked, data, **options)
    if data is not None and scored:
        if data.labels is not None:
            here = {theirs: label for label, theirs in there.items()}
            none = -1 if run.null_label is None else run.null_label
            of_run = [here.get(each, none) for each in data.labels.tolist()]
            data = replace(data, labels=np.asarray(of_run, np.int32))
        report["bits_per_dim"] = score(key, run, data, scored, seed, progress)
        how["scored"] = f"{min(scored, len(data.images)):,} images of {data.source}"
    report["left_out"] |= unscored
    return _report(num, report, made | how)


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
    agreement: bool = True,
    progress: Tell = None,
) -> dict[str, Any]:
    """The report of `evaluate`, with its arguments, for samples that somebody drew.

    Args:
      samples: a folder of `evaluate`, or what `load_dataset` reads: a .npz or .npy, a folder or an
        archive of pictures.
      num: how many of them are measured, the first. Default: all.
      range: of samples of others in a float array, as `Preparation` has it.
    """
    check_whole("seed", seed, 0)
    seed, asked, digest = int(seed), None, hashlib.sha256()
    found = run_on_all(lambda: open_samples(samples, range))
    count = found.num if num is None else num
    check_whole("num", count, 1, found.num)
    _check(data, found.image_shape, "the samples")
    if data is not None and data.labels is not None and found.labels is not None:
        there = matched(found.class_names, np.unique(found.labels).tolist(), data, some=True)
        asked = np.asarray([there.get(each, -1) for each in found.labels[:count].tolist()])

    def batches() -> Iterator[np.ndarray]:
        done = 0
        for batch in found.batches():
            if done >= count:
                return
            images = batch[: count - done]
            digest.update(images.tobytes())
            yield images
            done += len(images)
            if progress:
                progress(Progress(done, count, what="samples"))

    options: Any = {"inception": inception, "reference": reference, "statistics": statistics}
    options |= {"seed": seed, "agreement": agreement, "progress": progress}
    report, how = _measure(found.image_shape, batches(), count, asked, data, **options)
    which = f"{count:,} of the {found.num:,} in {samples}, SHA-256 {digest.hexdigest()}"
    return _report(count, report, {"samples": which, **found.recipe, "split seed": seed, **how})


def _report(num: int, report: dict[str, Any], recipe: dict[str, Any]) -> dict[str, Any]:
    """What both return: numbers, figures, and how to measure again."""
    steps = {"steps": recipe["steps"]} if "steps" in recipe else {}
    versions = {"jax_ddpm": __version__, "jax": jax.__version__}
    return {"num": num} | steps | report | {"recipe": recipe | {"versions": versions}}


def _measure(
    image_shape: tuple[int, ...],
    batches: Iterable[np.ndarray],
    num: int,
    asked: np.ndarray | None,
    data: Dataset | None,
    *,
    inception: PathLike | None,
    reference: PathLike | None,
    statistics: PathLike | None,
    seed: int,
    agreement: bool,
    progress: Tell,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Distances of `num` samples, and the label agreement of the first, whose labels in the data
    are `asked`, with what is left out and what is to be noted; and how all that was measured."""
    network = run_on_all(lambda: feature_network(image_shape, inception))
    if statistics is not None and (network is None or reference is not None):
        problem = "expected Inception's weights and real images, got"
        problem += " no weights" if network is None else " statistics for these"
        raise FieldError("statistics", problem)
    left_out, notes = {}, []
    if reference is not None:
        if network is None:
            problem = "statistics are of Inception's features, and come with "
            raise FieldError("reference", problem, Field("inception"), f": {WHERE}")
        target = run_on_all(lambda: reference_of_file(reference, network))
        digest = hashlib.sha256(Path(reference).read_bytes()).hexdigest()
        against = {"reference": f"{reference}, SHA-256 {digest}"}
        notes.append("statistics stand for the real images: nothing compares image with image")
    elif data is None:
        raise FieldError("data", "expected real images, or ", Field("reference"), ", got neither")
    else:
        import_module("sklearn")  # before the work
        tell = progress and (lambda done, of: progress(Progress(done, of, what="real images")))
        target = reference_of_images(data, network, num, seed=seed, progress=tell)
        real, total = target.real.statistics[target.network.main], len(data.images)
        if statistics is not None:
            run_on_writer(lambda: save_statistics(statistics, real))
        images = f"{real.num:,} of the {total:,} images of {data.source}"
        against = {"reference": f"{images}, SHA-256 {data.digest()}"}
        if target.at_most is not None:
            against["compared"] = f"{target.at_most:,} samples"
        ones, others = target.halves
        against["held out"] = f"{ones:,} real images against {others:,} others"
        if (fewest := min(target.at_most or num, real.num)) < _FEW:
            few = f"precision and recall say little of {fewest} images"
            notes.append(f"{few}: of fewer than {_FEW}, noise may look real")
    judged: list[np.ndarray] = []

    def passing() -> Iterator[np.ndarray]:
        for batch in batches:
            if sum(map(len, judged)) < _JUDGED:
                judged.append(batch)
            yield batch

    figures = target.measure(passing(), num)
    if "fid" in figures and num < _MANY:
        few = f"FID of {num:,} samples is larger than of many"
        notes.append(f"{few}: compare it with that of as many")
    if reference is None:
        figures["held_out"] = target.floor
        kernel = "kid" if "fid" in figures else "classifier_kernel_distance"
        missing = {kernel, "precision", "recall"} - figures.keys()
        left_out = dict.fromkeys(sorted(missing), "there are too few samples or images")
    try:
        if not agreement:
            raise FieldError(None, "it was not asked for")
        if data is None or data.labels is None or asked is None:
            raise FieldError(None, "the samples or the images have no classes")
        samples, labels = to_float(np.concatenate(judged)[:_JUDGED]), asked[:_JUDGED]
        samples, labels = samples[labels >= 0], labels[labels >= 0]
        share, held_out = label_agreement(data, samples, labels, seed)
        figures |= {"agreement": share, "svc_held_out": held_out, "judged": len(samples)}
    except (FieldError, ImportError) as error:
        left_out["agreement"] = str(error)
    how = {"features": target.network.description, **against, "pixels": "rounded to 8 bits"}
    return figures | {"left_out": left_out, "notes": notes}, how


def label_agreement(
    data: Dataset, samples: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """How often an SVC names the label of a sample, and of a real image held out from it; raises
    `FieldError` where that takes long, or it cannot learn the labels and be tried on others."""
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    assert data.labels is not None
    if not len(labels):
        raise FieldError(None, "the samples and the images have no class in common")
    classes, numbers = np.unique(data.labels), int(np.prod(data.image_shape))
    if len(classes) > _CLASSES or numbers > _NUMBERS:
        expected = f"an SVC judges up to {_CLASSES} classes of up to {_NUMBERS:,} numbers an image"
        raise FieldError(None, f"{expected}; there are {len(classes):,} of {numbers:,}")
    chosen = np.arange(len(data.labels))
    if len(chosen) > _JUDGED_BY:
        # Some of each class first, or none of a rare one could be held out.
        order = np.random.default_rng(seed).permutation(len(chosen))
        sorts = [order[data.labels[order] == label] for label in classes]
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


def score(
    key: Any, run: DiffusionModel, data: Dataset, num: int, seed: int, progress: Tell
) -> float:
    """The bound in bits per dimension, a mean over `num` of the images, labels below 0 left out."""
    model: Any = run.model
    # Files are often sorted by class.
    chosen = np.random.default_rng(seed).permutation(len(data.images))
    classes = data.labels if run.num_classes else None
    chosen = (chosen if classes is None else chosen[classes[chosen] >= 0])[:num]
    size = min(_BATCH, len(chosen))

    def bound(variables, images, numbers, labels=None):
        def denoise_fn(x_t, t):
            return model.apply(variables, x_t, t, *(() if labels is None else (labels,)))

        options = {"first_sample": numbers[0], **run.policy}
        return bits_per_dim(key, run.schedule, denoise_fn, images, **options).total

    def batches() -> Iterator[tuple[np.ndarray, ...]]:
        for first in range(0, len(chosen), size):
            rows = chosen[first : first + size]
            numbers = np.arange(first, first + len(rows), dtype=np.int32)
            of_class = () if classes is None else (classes[rows],)
            yield to_float(data.whole(rows)), numbers, *of_class

    totals = []
    for bits in over_devices(bound, run.variables, batches(), size):
        totals.extend(bits)
        if progress:
            progress(Progress(len(totals), len(chosen), what="bits per dimension"))
    mean = float(np.mean(totals))
    if not np.isfinite(mean):
        raise FieldError(None, f"bits per dimension: expected a finite number, got {mean}")
    return mean


def feature_network(
    image_shape: tuple[int, ...], inception: PathLike | None
) -> FeatureNetwork | None:
    """Inception, where its weights are given and images are RGB; None: a classifier is needed."""
    if image_shape[-1] != 3 and inception is not None:
        problem = f"expected images of 3 channels, which Inception knows, got {image_shape[-1]}"
        raise FieldError("inception", problem)
    if image_shape[-1] != 3 or not (inception or os.environ.get(VARIABLE)):
        return None
    try:
        return load_inception(inception)
    except (FieldError, ImportError) as error:  # torch is imported for a pickle
        raise FieldError("inception", *getattr(error, "problem", [str(error)])) from None


def drawn(run: DiffusionModel, chain: NoiseSchedule, sampler: Sampler) -> dict[str, Any]:
    """What decides samples, but for the seed and the classes."""
    weights = hashlib.sha256()
    for name, leaf in flatten(run.variables).items():
        weights.update(name.encode())
        weights.update(np.ascontiguousarray(leaf).data)
    tables = hashlib.sha256(np.asarray([chain.betas, chain.timesteps], np.float64).tobytes())
    return {
        "sampler": sampler.name or described(sampler.step),
        "steps": chain.num_timesteps,
        "chain": f"SHA-256 {tables.hexdigest()} of β and t",
        "guidance": run.guidance,
        **{option: str(value) for option, value in run.policy.items()},
        "weights": f"SHA-256 {weights.hexdigest()}",
    }


def _check(data: Dataset | None, shape: tuple[int, ...], others: str) -> None:
    """Raises `FieldError` unless these are images of this shape, which is that of `others`."""
    if data is not None:
        data.check()
        if data.image_shape != shape:
            problem = f"expected images of {shape}, as {others}, got {data.image_shape}"
            raise FieldError("data", problem)


def _is_8_bit(data: Dataset) -> bool:
    """Whether every pixel is one of 256 levels."""
    if data.images.dtype == np.uint8:
        return True
    levels = (np.asarray(data.images).astype(np.float64) + 1) * 127.5
    # 17 grey levels of scikit-learn's digits are no bins of 1/255.
    return bool(np.allclose(levels, np.round(levels), atol=1e-3))
