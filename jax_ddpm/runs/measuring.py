"""Figures for a run, from the images that it learned.

Samples are judged by a support vector machine that was trained on real images (at most 10,000 of
them): how often does it name the class that was asked for? Beside it stands how often it names the
class of real images that it has not seen. Pixels of 8 bits also have a likelihood: the bound of
`bits_per_dim`.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import jax
import numpy as np

from jax_ddpm._checks import FieldError, check_positive, checked
from jax_ddpm.data import Dataset, to_float
from jax_ddpm.likelihood import bits_per_dim
from jax_ddpm.runs.drawing import draw, labels_in_turn, make_chain, with_guidance
from jax_ddpm.runs.progress import Progress
from jax_ddpm.runs.run import Run
from jax_ddpm.samplers import Sampler, ancestral

__all__ = ["check_measurable", "evaluate", "label_agreement"]

_BATCH = 250
_HELD_OUT = 0.2
_JUDGED_BY = 10_000
_OF_EACH = 5


@checked
def evaluate(
    run: Run,
    data: Dataset,
    *,
    num: int = 1000,
    steps: int | None = None,
    sampler: Sampler | None = None,
    guidance: float | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> dict[str, Any]:
    """Measure a run: `steps`, `agreement` and `svc_held_out` where it has classes, `bits_per_dim`
    where pixels have 8 bits.

    Args:
      run: what is measured.
      data: the images that it learned.
      num: how many samples are judged, and at most how many images are scored.
      steps: of the reverse chain. Default: all.
      sampler: the update rule. Default: `ancestral()`.
      guidance: scale of classifier-free guidance. Default: the run's.
      seed: of the samples, and of the split of the data.
      progress: as in `draw`.

    Raises:
      FieldError: naming what does not suit the run.
    """
    check_positive(num=num, steps=steps)
    run = with_guidance(run, guidance)
    chain = make_chain(run, run.pretrained.schedule.num_timesteps if steps is None else steps)
    check_measurable(run, data)
    figures: dict[str, Any] = {}
    if run.num_classes is not None:
        rule, labels = sampler or ancestral(), labels_in_turn(run, num)
        assert labels is not None
        samples = draw(jax.random.key(seed), run, num, chain=chain, sampler=rule, progress=progress)
        agreement, held_out = label_agreement(data, samples, labels, seed)
        figures = {
            "steps": chain.num_timesteps,
            "agreement": agreement,
            "svc_held_out": held_out,
        }
    if _is_8_bit(data):
        figures["bits_per_dim"] = _bits_per_dim(run, data, num, seed)
    return figures


def check_measurable(run: Run, data: Dataset) -> None:
    """Raises `FieldError` unless these can be images that the run learned."""
    data.check()
    if data.image_shape != run.image_shape:
        problem = f"expected images of {run.image_shape}, as the run's, got {data.image_shape}"
        raise FieldError("data", problem)
    if run.num_classes is None:
        return
    if data.labels is None:
        raise FieldError("data", "expected labels, since the run has classes, got none")
    if data.labels.max() >= run.num_classes:
        problem = f"expected labels up to {run.num_classes - 1}, as the run's"
        raise FieldError("data", f"{problem}, got {data.labels.max()}")
    counts = np.bincount(data.labels)
    if counts[counts > 0].min() < 2 or _HELD_OUT * len(data.labels) < np.count_nonzero(counts):
        problem = f"too few images for {np.count_nonzero(counts)} classes: a fifth is held out"
        raise FieldError("data", f"{problem}, at least one of each class")
    import_module("sklearn")  # before the work


def label_agreement(
    data: Dataset, samples: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """How often an SVC names the label of a sample, and of a real image held out from it."""
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
    flat = to_float(data.images[chosen]).reshape(len(chosen), -1)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        flat, labels_of, test_size=_HELD_OUT, random_state=seed, stratify=labels_of
    )
    judge = SVC(C=10).fit(seen, seen_labels)
    agreement = float(judge.score(samples.reshape(len(samples), -1), labels))
    return agreement, float(judge.score(unseen, unseen_labels))


def _is_8_bit(data: Dataset) -> bool:
    if data.images.dtype == np.uint8:
        return True
    images = np.asarray(data.images)
    levels = (images.astype(np.float64) + 1) * 127.5
    # 17 grey levels of scikit-learn's digits are no bins of 1/255.
    return bool(np.allclose(levels, np.round(levels), atol=1e-3))


def _bits_per_dim(run: Run, data: Dataset, num: int, seed: int) -> float:
    model: Any = run.pretrained.model
    # Files are often sorted by class.
    chosen = np.random.default_rng(seed).permutation(len(data.images))[:num]

    @jax.jit
    def bound(variables, images, labels, first_sample):
        def denoise_fn(x_t, t):
            arguments = (x_t, t) if labels is None else (x_t, t, labels)
            return model.apply(variables, *arguments)

        return bits_per_dim(
            jax.random.key(seed),
            run.pretrained.schedule,
            denoise_fn,
            images,
            first_sample=first_sample,
            **run.pretrained.policy,
        ).total

    totals = []
    for first in range(0, len(chosen), _BATCH):
        batch = chosen[first : first + _BATCH]
        labels = data.labels[batch] if run.num_classes and data.labels is not None else None
        images = to_float(data.images[batch])
        totals.append(bound(run.pretrained.variables, images, labels, first))
    return float(np.mean(np.concatenate(totals)))
