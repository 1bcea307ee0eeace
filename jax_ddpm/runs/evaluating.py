"""The evaluation of a model or of samples against real images.

A folder of samples, in which a long draw resumes, holds `recipe.json`, how they are drawn, and
batches, uint8 [image, height, width, channel]: `00000256.npy` begins with sample 256.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_ddpm import __version__
from jax_ddpm._errors import Field, FieldError, check_positive, check_whole, described
from jax_ddpm.data import Dataset, Preparation, load_dataset, to_bytes, to_float
from jax_ddpm.evaluation import FeatureNetwork, load_inception, save_statistics
from jax_ddpm.evaluation.features import VARIABLE, WHERE, over_devices
from jax_ddpm.evaluation.reference import reference_of_file, reference_of_images
from jax_ddpm.interop import DiffusionModel
from jax_ddpm.io.arrays import flatten
from jax_ddpm.io.files import make_folder, read_json, replace_file, write_json
from jax_ddpm.likelihood import bits_per_dim
from jax_ddpm.noise import seed_key
from jax_ddpm.runs.drawing import labels_in_turn, make_chain, make_drawer, with_guidance
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.runs.model import PathLike, matched
from jax_ddpm.runs.programs import guided_denoise_fn
from jax_ddpm.samplers import Sampler, ancestral
from jax_ddpm.schedule import NoiseSchedule, warn_of_signal
from jax_ddpm.training.hosts import broadcast, run_on_all, run_on_writer

Tell = Callable[[Progress], None] | None

_JUDGED_BY, _HELD_OUT, _OF_EACH = 10_000, 0.2, 5
_JUDGED, _CLASSES, _NUMBERS = 1000, 100, 4096
"""An SVC has a machine for each pair of classes, and kernels of all numbers of an image."""
_SCORED, _BATCH = 1000, 250
_VERSIONS = {"jax_ddpm": __version__, "jax": jax.__version__}
_RECIPE = "recipe.json"
_MANY, _FEW = 10_000, 100
"""Precision is of balls as wide as the third neighbour is far, which cover too much if there are
few: of 15 digits noise has a precision of up to 80 %, and held-out digits of 100 %."""


class Samples(NamedTuple):
    """Images that somebody drew, or that are drawn as they are read."""

    num: int
    image_shape: tuple[int, int, int]
    labels: np.ndarray | None
    """The classes that were asked for, if they are known."""
    class_names: tuple[str, ...] | None
    recipe: dict[str, Any]
    """How they are drawn, as far as it is known."""
    batches: Callable[[], Iterable[np.ndarray]]
    """uint8, from the first on."""


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
    """Sample from a model, and compare with real images: FID, KID, precision, recall, likelihood.

    It draws the learned classes that the images show, or all if they show none, and warns of the
    others. Classes are matched by name where both sides have names, or those of one are numbers,
    else by number.

    Args:
      model: from `load_run`, `load_model`, `load_diffusers` or `load_openai`.
      data: the real images. Default: `reference` stands for them.
      num: the number of samples; 0: only bits per dimension are measured.
      steps, sampler, guidance, batch_size: as in `draw`. Default: all steps of `ancestral()`.
      seed: of the samples, and of the split of the data.
      inception: the file of Inception's weights, for RGB images, as `load_inception` reads it.
        Default: that of JAX_DDPM_INCEPTION, or else a small classifier learns half of `data`.
      reference: a .npz of `mu` and `sigma` of Inception's features, in place of those of `data`.
      statistics: a .npz to which `mu` and `sigma` of the real images are written.
      folder: keeps the samples as they are drawn; the same call resumes a draw that was stopped.
      num_scored: the number of images scored in bits per dimension. Default: `num`, at most 1,000.
      agreement: whether a support vector machine, trained on real images, classifies the first
        1,000 samples; for at most 100 classes and 4,096 numbers an image.
      progress: a callback, given a `Progress` as the work proceeds.

    Returns:
      A report by name; `…_std` is a standard deviation. Always: `num`, `steps`, `recipe` (all that
        decides the figures), `notes`, and `left_out` (why, by the figure's name). With Inception:
        `fid`, `fid_64`, `fid_192`, `fid_768`, `kid`, `inception_score`; without:
        `classifier_frechet_distance`, `classifier_kernel_distance`. With images: `precision`,
        `recall`, `nearest`, `nearest_real`, `nearer_than_1_percent`, `held_out` (the same figures
        of real images), and for uint8 `bits_per_dim`. With classes: `agreement`, the share of
        samples classified as the class that was asked for, `svc_held_out`, `judged`.

    Raises:
      FieldError: an argument does not fit the model or the images.

    Examples:
      >>> model, labels = runs.load_run("runs/digits"), np.arange(10, dtype=np.int32)
      >>> images = data.Dataset(np.zeros((10, 8, 8, 1), np.uint8), labels)
      >>> report = runs.evaluate(model, images, num=0, num_scored=4)
      >>> report["bits_per_dim"] > 0, report["steps"]
      (True, 20)
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
    shape = run.shape(1)[1:]
    _check(data, shape)
    there = {label: label for label in run.drawn}
    if data is not None and data.labels is not None and run.num_classes is not None:
        there = matched(run.class_names, run.drawn, data)
    scored = min(num, _SCORED) if num_scored is None else num_scored
    if num_scored and data is None:
        raise FieldError("num_scored", "expected images to score, got none")
    if not num and (not scored or reference or statistics or folder):
        problem = "expected more than 0: without samples there are only bits per dimension, got 0"
        raise FieldError("num", problem)
    recipe = drawn(run, chain, sampler) | {"seed": seed}
    report: dict[str, Any] = {"num": 0, "steps": chain.num_timesteps, "left_out": {}, "notes": []}
    report["recipe"] = recipe | {"versions": _VERSIONS}
    if num:
        labels = labels_in_turn(run, num, [*there] or None)
        batches_of = make_drawer(run, chain, sampler, min(num, batch_size))
        draw = partial(batches_of, key, run.variables, num, labels, progress=progress)
        made = recipe | {"class_names": run.class_names, "labels": [*there] or [*run.drawn]}
        batches = map(to_bytes, draw()) if folder is None else resumed(folder, made, num, draw)
        labels = labels if there else None
        samples = Samples(num, shape, labels, run.class_names, recipe, lambda: batches)
        options: Any = {"seed": seed, "agreement": agreement, "progress": progress}
        options |= {"inception": inception, "reference": reference, "statistics": statistics}
        report = evaluate_samples(samples, data, **options)
    if data is not None and scored:
        try:
            report["bits_per_dim"] = score(run, data, there, scored, seed, progress)
            report["recipe"]["scored"] = f"{min(scored, len(data)):,} images of {data.source}"
        except FieldError as error:
            if not num:
                raise FieldError("num_scored", str(error)) from None
            report["left_out"]["bits_per_dim"] = str(error)
    return report


def evaluate_samples(
    samples: PathLike | Samples,
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
    """The report of `evaluate`, without `bits_per_dim`, for samples that any program has written.

    Args:
      samples: a .npz or .npy, a folder or an archive of pictures, or the `folder` of `evaluate`.
      data, seed, inception, reference, statistics, agreement, progress: as in `evaluate`.
      num: the number of samples measured, the first. Default: all.
      range: of a float array, as in `Preparation`.

    Raises:
      FieldError: a file cannot be read, or an argument does not fit.
    """
    check_whole("seed", seed, 0)
    if isinstance(samples, Samples):
        found, where = samples, "drawn here"
    else:
        found, where = run_on_all(lambda: open_samples(samples, range)), f"in {samples}"
    seed, num = int(seed), found.num if num is None else num
    check_whole("num", num, 1, found.num)
    _check(data, found.image_shape)
    if reference is not None and statistics is not None:
        raise FieldError("statistics", "expected none with ", Field("reference"))
    network = run_on_all(lambda: feature_network(found.image_shape, inception))
    if network is None and (reference or statistics):
        name, problem = "reference" if reference else "statistics", "expected Inception's weights, "
        raise FieldError(name, problem, Field("inception"), f", for RGB images: {WHERE}")
    if reference is not None and network is not None:
        target = run_on_all(lambda: reference_of_file(reference, network))
    elif data is None:
        raise FieldError("data", "expected real images, or ", Field("reference"), ", got neither")
    else:
        tell = progress and (lambda done, of: progress(Progress(done, of, what="real images")))
        target = reference_of_images(data, network, num, seed=seed, progress=tell)
    if statistics is not None:
        real = target.real.statistics[target.network.main]
        run_on_writer(lambda: save_statistics(statistics, real))
    unjudged = _unjudged(data, found.labels) if agreement else "it was not asked for"
    first, digest = [], hashlib.sha256()

    def batches() -> Iterator[np.ndarray]:
        done = 0
        for batch in found.batches():
            if unjudged is None and done < _JUDGED:
                first.append(batch)
            digest.update(batch.tobytes())
            yield batch
            done += len(batch)
            if progress and found is not samples:
                progress(Progress(done, found.num, what="samples"))

    report = {"num": num} | {name: x for name, x in found.recipe.items() if name == "steps"}
    report |= target.measure(batches(), num)
    wanted = [] if network is None else ["inception_score"]
    if reference is None:
        kernel = "classifier_kernel_distance" if network is None else "kid"
        wanted += [kernel, "precision", "recall"]
    why = "there are too few samples or images"
    left_out = {name: why for name in wanted if name not in report}
    if target.floor:
        report["held_out"] = target.floor
    if unjudged is None and data is not None:
        labels: Any = found.labels
        there = matched(found.class_names, np.unique(labels).tolist(), data, some=True)
        images = np.concatenate(first)[: min(num, _JUDGED)]
        asked = [there.get(label, -1) for label in labels[: len(images)].tolist()]
        try:
            report |= label_agreement(data, images, np.asarray(asked), seed)
        except (ValueError, ImportError) as error:
            unjudged = str(error)
    if unjudged is not None:
        left_out["agreement"] = unjudged
    notes, few = [], min(target.at_most or num, len(target.real.kept))
    if reference is not None:
        notes.append("statistics stand for the real images: nothing compares image with image")
    if "precision" in report and few < _FEW:
        notes.append(f"precision and recall say little of {few} images: noise may look real")
    if "fid" in report and num < _MANY:
        notes.append(f"FID of {num:,} samples is larger than of many: compare like with like")
    recipe = {
        "samples": f"{num:,} of the {found.num:,} {where}, SHA-256 {digest.hexdigest()}",
        **found.recipe,
        "split seed": seed,
        "features": target.network.description,
        **target.how,
        "pixels": "rounded to 8 bits",
        "versions": _VERSIONS,
    }
    return report | {"left_out": left_out, "notes": notes, "recipe": recipe}


def _unjudged(data: Dataset | None, labels: np.ndarray | None) -> str | None:
    """Why no SVC judges samples of these labels, as far as it is known before they are drawn."""
    if data is None or data.labels is None or labels is None:
        return "the samples and the images have no classes in common"
    classes, numbers = len(np.unique(data.labels)), int(np.prod(data.image_shape))
    if classes > _CLASSES or numbers > _NUMBERS:
        most = f"an SVC judges at most {_CLASSES} classes and {_NUMBERS:,} numbers an image"
        return f"{most}, got {classes:,} classes and {numbers:,} numbers"
    return None


def label_agreement(
    data: Dataset, samples: np.ndarray, labels: np.ndarray, seed: int = 0
) -> dict[str, float]:
    """How often an SVC that learned up to 10,000 real images names the label of a sample, and of
    real images held out from it. Raises `ValueError` where it cannot judge. Samples of labels that
    it did not learn are left out."""
    from sklearn.model_selection import train_test_split
    from sklearn.svm import SVC

    assert data.labels is not None
    order = np.random.default_rng(seed).permutation(len(data))
    # Some of each class first, or none of a rare one could be held out.
    some = [order[data.labels[order] == label][:_OF_EACH] for label in np.unique(data.labels)]
    rest = np.setdiff1d(order, np.concatenate(some), assume_unique=True)
    chosen = np.sort(np.concatenate([*some, rest])[:_JUDGED_BY])
    learned = data.labels[chosen]
    known = np.isin(labels, learned)
    if not known.any():
        raise FieldError(None, "the samples and the images have no classes in common")
    # scikit-learn takes seeds of 32 bits.
    state: Any = seed if seed < 2**32 else np.random.RandomState(np.random.MT19937(seed))
    images = to_float(data.whole(chosen)).reshape(len(chosen), -1)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        images, learned, test_size=_HELD_OUT, random_state=state, stratify=learned
    )
    judge = SVC(C=10).fit(seen, seen_labels)
    samples = to_float(samples[known]).reshape(known.sum(), -1)
    return {
        "agreement": judge.score(samples, labels[known]),
        "svc_held_out": judge.score(unseen, unseen_labels),
        "judged": len(samples),
    }


def score(
    run: DiffusionModel, data: Dataset, there: dict[int, int], num: int, seed: int, progress: Tell
) -> float:
    """The bound in bits per dimension, a mean over `num` of the images, whose own label for each
    label of the run is `there`. Raises `FieldError` saying why there is none."""
    key = seed_key(seed)
    chosen = np.random.default_rng(seed).permutation(len(data))  # files are often sorted by class
    labels = np.zeros(len(data), np.int32)
    if run.num_classes is not None and data.labels is not None:
        here = {theirs: label for label, theirs in there.items()}
        none = -1 if run.null_label is None else run.null_label
        labels = np.asarray([here.get(each, none) for each in data.labels.tolist()], np.int32)
        chosen = chosen[labels[chosen] >= 0]
    unlabelled = run.num_classes is not None and data.labels is None
    if data.images.dtype != np.uint8 or unlabelled or not len(chosen):
        raise FieldError(None, "it needs images of uint8, with labels where the model has classes")
    chosen, size = chosen[:num], min(_BATCH, num, len(chosen))

    def bound(variables, images, numbers, labels):
        plain, labels = run._replace(guidance=1.0), labels if run.num_classes else None
        denoise_fn = guided_denoise_fn(plain, variables, labels)
        options: Any = {"first_sample": numbers[0], **run.policy}
        return bits_per_dim(key, run.schedule, denoise_fn, images, **options).total

    numbers, totals = np.arange(len(chosen), dtype=np.int32), []
    parts = ((chosen[part], part) for part in np.split(numbers, range(size, len(chosen), size)))
    batches = ((to_float(data.whole(rows)), part, labels[rows]) for rows, part in parts)
    for bits in over_devices(bound, run.variables, batches, size):
        totals.extend(bits)
        if progress:
            progress(Progress(len(totals), len(chosen), what="bits per dimension"))
    mean = float(np.mean(totals))
    if not np.isfinite(mean):
        raise FieldError(None, f"expected a finite number, got {mean}")
    return mean


def feature_network(
    image_shape: tuple[int, ...], inception: PathLike | None
) -> FeatureNetwork | None:
    """Inception, where its weights are given, or known and of use; None: a classifier is needed."""
    channels = image_shape[-1]
    if inception is None and (channels != 3 or not os.environ.get(VARIABLE)):
        return None
    if channels != 3:
        raise FieldError("inception", f"expected images of 3 channels with it, got {channels}")
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


def _check(data: Dataset | None, shape: tuple[int, ...]) -> None:
    """Raises `FieldError` unless these are images of this shape, which is that of the samples."""
    if data is not None:
        data.check()
        if data.image_shape != shape:
            got = data.image_shape
            raise FieldError("data", f"expected images of {shape}, as the samples are, got {got}")


def open_samples(path: PathLike, value_range: Any = None) -> Samples:
    """Samples from a folder of `resumed`, or from whatever `load_dataset` reads, with this range.
    Raises `FieldError` naming what cannot be read."""
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise FieldError("samples", f"no such file or folder: {path}")
    try:
        if (path / _RECIPE).is_file():
            shapes, recipe = [batch.shape for batch in _kept(path)], read_json(path / _RECIPE)
            if not shapes:
                raise ValueError(f"expected samples in {path}, got none yet")
            num, names = sum(shape[0] for shape in shapes), recipe.pop("class_names", None)
            turn = recipe.pop("labels", None)
            labels = np.resize(np.asarray(turn, np.int32), num) if turn else None
            kept = (num, shapes[0][1:], labels, names, recipe)
            return Samples(*kept, lambda: islice(_kept(path), len(shapes)))
        data = load_dataset(path, Preparation(range=value_range))
    except ValueError as error:
        raise FieldError("samples", *getattr(error, "problem", [str(error)])) from None
    recipe = {"read as": "; ".join(data.notes)} if data.notes else {}
    parts = [slice(start, start + _BATCH) for start in range(0, len(data), _BATCH)]
    read = partial(map, lambda part: to_bytes(data.images[part]), parts)
    return Samples(len(data), data.image_shape, data.labels, data.class_names, recipe, read)


def resumed(
    folder: PathLike, recipe: dict[str, Any], total: int, draw: Callable[..., Iterator[np.ndarray]]
) -> Iterator[np.ndarray]:
    """The first `total` samples of this recipe: those in the folder, then those of
    `draw(first_sample=…)`, each batch written before it is given. Raises `FieldError` at once if
    the folder holds something else."""
    folder, recipe = Path(folder), json.loads(json.dumps(recipe))

    def begin() -> int:
        if not (folder / _RECIPE).exists():
            if folder.is_file() or (folder.exists() and any(folder.iterdir())):
                raise FieldError("folder", f"expected a new or empty folder, got {folder}")
            make_folder(folder)
            write_json(folder / _RECIPE, recipe)
        try:
            before, count = read_json(folder / _RECIPE), sum(map(len, _kept(folder)))
        except ValueError as error:
            raise FieldError("folder", f"{error}; choose another folder") from None
        for name in [*recipe, *before]:
            if before.get(name) != recipe.get(name):
                what = f"holds other samples: {name} was {before.get(name)}, is {recipe.get(name)}"
                raise FieldError("folder", f"{folder} {what}; choose another folder")
        return count

    count = broadcast(run_on_writer(begin)) or 0

    def batches() -> Iterator[np.ndarray]:
        done = 0
        while done < min(count, total):
            read = run_on_writer(_file(folder, done).read_bytes)
            batch = np.load(io.BytesIO(broadcast(read or b"")))
            yield batch[: total - done]
            done += len(batch)
        for images in draw(first_sample=done) if done < total else ():
            batch, content = to_bytes(images), io.BytesIO()
            np.save(content, batch)
            run_on_writer(partial(replace_file, _file(folder, done), content.getvalue()))
            done += len(batch)
            yield batch

    return batches()


def _file(folder: Path, number: int) -> Path:
    """That of the batch which begins with this sample."""
    return folder / f"{number:08d}.npy"


def _kept(folder: Path) -> Iterator[np.ndarray]:
    """The batches that follow one another from the first sample on, each mapped from its file.
    Raises `ValueError` naming one that is damaged."""
    done = 0
    while (path := _file(folder, done)).exists():
        try:
            batch = np.load(path, mmap_mode="r")
            if not isinstance(batch, np.ndarray) or not batch.size:
                raise ValueError("expected images")
        except Exception as error:  # NumPy's, and its tokenizer's of a header
            raise ValueError(
                f"cannot read {path}: {error}: without it, it is drawn again"
            ) from None
        yield batch
        done += len(batch)
