"""Figures for a model or for samples, from real images: what draws, compares, records and reports.

Distances are those of `evaluation`. Where there are classes, a support vector machine that was
trained on real images also judges the first 1,000 samples: how often does it name the class that
was asked for? Pixels of 8 bits also have a likelihood: the bound of `bits_per_dim`.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import Any, Literal

import jax
import numpy as np

from jax_ddpm import __version__
from jax_ddpm._errors import Field, FieldError, check_positive, check_whole, described
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
from jax_ddpm.runs.samples import open_samples, resumed
from jax_ddpm.samplers import Sampler, ancestral
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal
from jax_ddpm.training.hosts import run_on_all, run_on_writer

Tell = Callable[[Progress], None] | None

_JUDGED_BY, _HELD_OUT, _OF_EACH = 10_000, 0.2, 5
_JUDGED, _CLASSES, _NUMBERS = 1000, 100, 4096
"""An SVC has a machine for each pair of classes, and kernels of all numbers of an image."""
_SCORED, _BATCH = 1000, 250
_VERSIONS = {"versions": {"jax_ddpm": __version__, "jax": jax.__version__}}
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
    """Draw from a model, and measure: how near are its samples to real images, do they show what
    was asked for, and how likely are real images under the model?

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

    What ends in `_std` is a spread. Classes are matched by name where both sides have names, or
    those of one are numbers, else by number. It draws the learned classes that the images show, or
    all learned classes if they show none, and warns of the others.

    Args:
      model: from `load_run`, `load_diffusers` or `load_openai`.
      data: the images that it learned. None: `reference` stands for them.
      num: how many samples are drawn; 0: only bits per dimension are measured.
      steps, sampler, guidance, batch_size: as in `draw`. Default: all steps of `ancestral()`.
      seed: of the samples, and of the split of the data.
      inception: the file of Inception's weights, for RGB images, as `load_inception` reads it.
        Default: that of JAX_DDPM_INCEPTION, or else a small classifier learns half of `data`.
      reference: a .npz of `mu` and `sigma` of Inception's features, in place of those of `data`.
      statistics: a .npz that `mu` and `sigma` of Inception's features of `data` are written to.
      folder: where samples are kept as they are drawn; the same call resumes a draw that stopped.
      num_scored: how many images are scored in bits per dimension, 0 for none. Default: `num`, at
        most 1,000, where they are of 8 bits.
      agreement: whether a support vector machine judges the samples, where there are at most 100
        classes and 4,096 numbers an image.
      progress: called as the work proceeds.
    """
    check_positive(steps=steps, batch_size=batch_size)
    check_whole("num", num, 0)
    check_whole("num_scored", num_scored or 0, 0)
    key, seed = seed_key(seed), int(seed)
    run, sampler = with_guidance(model, guidance), sampler or ancestral()
    if folder is not None and not sampler.name:
        raise FieldError("sampler", "expected one with a name, since samples are kept, got none")
    chain = make_chain(run, run.schedule.num_timesteps if steps is None else steps)
    warn_of_signal(chain)
    image_shape, shown = run.shape(1)[1:], None if data is None else data.labels
    _check(data, image_shape, "the run's")
    there = {label: label for label in run.drawn}
    if data is not None and shown is not None and run.num_classes is not None:
        there = matched(run.class_names, run.drawn, data)
    turn = [*there] or [*run.drawn]
    scored, unscored = min(num, _SCORED) if num_scored is None else num_scored, {}
    labelled = shown is not None and (there or run.null_label is not None)
    if data is None or not _is_8_bit(data) or (run.num_classes and not labelled):
        needed = "images of 8 bits, with labels where the model has classes"
        if num_scored:
            raise FieldError("num_scored", f"expected {needed}, got {num_scored} to score")
        if scored and data is not None:
            unscored["bits_per_dim"] = f"it needs {needed}"
        scored = 0
    if not num and (not scored or reference or statistics or folder):
        problem = "expected more than 0: without samples there are only bits per dimension, got 0"
        raise FieldError("num", problem)
    report: dict[str, Any] = {"left_out": {}, "notes": []}
    recipe = drawn(run, chain, sampler) | {"seed": seed}
    if num:
        labels, asked = None, None
        if run.num_classes is not None:
            labels = np.resize(np.asarray(turn or [run.null_label], np.int32), num)
            asked = np.asarray([there.get(k, -1) for k in labels.tolist()]) if turn else None
        drawer = Drawer(run, chain, sampler, min(num, batch_size))
        draw = partial(drawer.batches, key, run.variables, num, labels, progress=progress)
        made = recipe | {"class_names": run.class_names, "labels": turn}
        batches = map(to_bytes, draw()) if folder is None else resumed(folder, made, num, draw)
        options: Any = {"inception": inception, "reference": reference, "statistics": statistics}
        options |= {"seed": seed, "agreement": agreement, "progress": progress}
        report, how = _measure(image_shape, batches, num, asked, data, **options)
        recipe |= how
    if data is not None and scored:
        if shown is not None:
            here = {theirs: label for label, theirs in there.items()}
            none = -1 if run.null_label is None else run.null_label
            shown = np.asarray([here.get(each, none) for each in shown.tolist()], np.int32)
            data = replace(data, labels=shown)
        report["bits_per_dim"] = score(key, run, data, scored, seed, progress)
        recipe["scored"] = f"{min(scored, len(data.images)):,} images of {data.source}"
    report["left_out"] |= unscored
    return {"num": num, "steps": chain.num_timesteps, **report, "recipe": recipe | _VERSIONS}


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
        left = count
        for batch in found.batches():
            images = batch[:left]
            left -= len(images)
            digest.update(images.tobytes())
            yield images
            if progress:
                progress(Progress(count - left, count, what="samples"))
            if not left:
                return

    options: Any = {"inception": inception, "reference": reference, "statistics": statistics}
    options |= {"seed": seed, "agreement": agreement, "progress": progress}
    report, how = _measure(found.image_shape, batches(), count, asked, data, **options)
    which = f"{count:,} of the {found.num:,} in {samples}, SHA-256 {digest.hexdigest()}"
    recipe = {"samples": which, **found.recipe, "split seed": seed, **how, **_VERSIONS}
    steps = {"steps": recipe["steps"]} if "steps" in recipe else {}
    return {"num": count, **steps, **report, "recipe": recipe}


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
    """The report on `num` samples, whose labels in the data are `asked`; and its recipe."""
    network = run_on_all(lambda: feature_network(image_shape, inception))
    if statistics is not None and (network is None or reference is not None):
        got = "no weights" if network is None else "statistics for these"
        raise FieldError("statistics", f"expected Inception's weights and real images, got {got}")
    notes, recipe = [], {}
    if reference is not None:
        if network is None:
            problem = "statistics are of Inception's features, and come with "
            raise FieldError("reference", problem, Field("inception"), f": {WHERE}")
        target = run_on_all(lambda: reference_of_file(reference, network))
        notes.append("statistics stand for the real images: nothing compares image with image")
    elif data is None:
        raise FieldError("data", "expected real images, or ", Field("reference"), ", got neither")
    else:
        import_module("sklearn")  # before the work
        tell = progress and (lambda done, of: progress(Progress(done, of, what="real images")))
        target = reference_of_images(data, network, num, seed=seed, progress=tell)
        real = target.real.statistics[target.network.main]
        if statistics is not None:
            run_on_writer(lambda: save_statistics(statistics, real))
        images = f"{real.num:,} of the {len(data.images):,} images of {data.source}"
        recipe["reference"] = f"{images}, SHA-256 {data.digest()}"
    unjudged = _unjudged(data, asked) if agreement else "it was not asked for"
    judged: list[np.ndarray] = []

    def passing() -> Iterator[np.ndarray]:
        for batch in batches:
            if unjudged is None and sum(map(len, judged)) < _JUDGED:
                judged.append(batch)
            yield batch

    figures = target.measure(passing(), num)
    fewest = min(target.at_most or num, len(target.real.kept))
    if "precision" in figures and fewest < _FEW:
        few = f"precision and recall say little of {fewest} images"
        notes.append(f"{few}: of fewer than {_FEW}, noise may look real")
    if "fid" in figures and num < _MANY:
        few = f"FID of {num:,} samples is larger than of many"
        notes.append(f"{few}: compare it with that of as many")
    wanted = [] if network is None else ["inception_score"]
    if reference is None:
        figures["held_out"] = target.floor
        kernel = "classifier_kernel_distance" if network is None else "kid"
        wanted += [kernel, "precision", "recall"]
    missing = [name for name in wanted if name not in figures]
    left_out = dict.fromkeys(missing, "there are too few samples or images")
    if unjudged is not None:
        left_out["agreement"] = unjudged
    elif data is not None and asked is not None:
        samples, labels = to_float(np.concatenate(judged)[:_JUDGED]), asked[:_JUDGED]
        samples, labels = samples[labels >= 0], labels[labels >= 0]
        try:
            share, held_out = label_agreement(data, samples, labels, seed)
            figures |= {"agreement": share, "svc_held_out": held_out, "judged": len(samples)}
        except (FieldError, ImportError) as error:
            left_out["agreement"] = str(error)
    recipe = {"features": target.network.description, **recipe, **target.how}
    recipe["pixels"] = "rounded to 8 bits"
    return figures | {"left_out": left_out, "notes": notes}, recipe


def _unjudged(data: Dataset | None, asked: np.ndarray | None) -> str | None:
    """Why no SVC judges samples, as far as is known before they are drawn; None: one may."""
    if data is None or data.labels is None or asked is None:
        return "the samples or the images have no classes"
    if not (asked[:_JUDGED] >= 0).any():
        return "the samples and the images have no class in common"
    classes, numbers = len(np.unique(data.labels)), int(np.prod(data.image_shape))
    if classes > _CLASSES or numbers > _NUMBERS:
        expected = f"an SVC judges at most {_CLASSES} classes and {_NUMBERS:,} numbers an image"
        return f"{expected}, got {classes:,} classes and {numbers:,} numbers"
    return None


def label_agreement(
    data: Dataset, samples: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """How often an SVC names the label of a sample, and of a real image held out from it; raises
    `FieldError` where it cannot learn the labels and be tried on others."""
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    assert data.labels is not None
    order = np.random.default_rng(seed).permutation(len(data.labels))
    # Some of each class first, or none of a rare one could be held out.
    some = [order[data.labels[order] == label][:_OF_EACH] for label in np.unique(data.labels)]
    rest = np.setdiff1d(order, np.concatenate(some), assume_unique=True)
    chosen = np.sort(np.concatenate([*some, rest])[:_JUDGED_BY])
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

    def bound(variables, images, numbers, *labels):
        def denoise_fn(x_t, t):
            return model.apply(variables, x_t, t, *labels)

        options = {"first_sample": numbers[0], **run.policy}
        return bits_per_dim(key, run.schedule, denoise_fn, images, **options).total

    def batch(numbers: np.ndarray) -> tuple[np.ndarray, ...]:
        rows = chosen[numbers]
        labels = () if classes is None else (classes[rows],)
        return to_float(data.whole(rows)), numbers, *labels

    parts = np.split(np.arange(len(chosen), dtype=np.int32), range(size, len(chosen), size))
    totals = []
    for bits in over_devices(bound, run.variables, map(batch, parts), size):
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
    """Whether every pixel is one of 256 levels: 17 greys of scikit-learn's digits are not."""
    if data.images.dtype == np.uint8:
        return True
    levels = (np.asarray(data.images).astype(np.float64) + 1) * 127.5
    return bool(np.allclose(levels, np.round(levels), atol=1e-3))
