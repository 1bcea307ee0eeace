"""`jax-ddpm evaluate`: figures for a run, from the data that it learned.

Samples are judged by a support vector machine that was trained on real images: how often does it
name the class that was asked for? Beside it stands how often it names the class of real images
that it has not seen. Pixels of 8 bits also have a likelihood: the bound of `bits_per_dim`.
"""

from typing import Any

import jax
import numpy as np
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from jax_ddpm.cli.config import (
    DevicesConfig,
    EvaluateConfig,
    UsageError,
    check_file,
    naming,
    positive,
    writing,
)
from jax_ddpm.cli.datasets import Dataset, load_dataset
from jax_ddpm.cli.devices import say, start_devices
from jax_ddpm.cli.draw import cycle_labels, draw_samples
from jax_ddpm.cli.runs import Run, load_run
from jax_ddpm.cli.sample import SAMPLERS, guided
from jax_ddpm.io.json import write_json
from jax_ddpm.likelihood import bits_per_dim
from jax_ddpm.training.hosts import on_writer, together

__all__ = ["evaluate", "label_agreement"]

_BATCH = 250


def evaluate(config: EvaluateConfig) -> None:
    """Measure as `config` says, and print."""
    positive(config, "num", "steps")
    check_file("--json", config.json)
    start_devices(DevicesConfig())
    run, data = together(lambda: _prepare(config))
    figures: dict[str, Any] = {"run": str(config.run)}
    if run.num_classes is None:
        say("agreement is left out: the run has no classes")
    else:
        figures |= _judge(config, run, data)
        say(
            f"{config.num:,} samples ({figures['steps']} {config.sampler} steps, guidance "
            f"{run.guidance:g}): {figures['agreement']:.1%} are what was asked for, by an SVC "
            f"that is right on {figures['svc_held_out']:.1%} of real images held out from it"
        )
    if _is_8_bit(data.images):
        figures["bits_per_dim"] = _bits_per_dim(config, run, data)
        say(f"{figures['bits_per_dim']:.3f} bits per dimension at most, on the images learned")
    else:
        say("bits per dimension are left out: the pixels are not those of 8 bits")
    if len(figures) == 1:
        raise UsageError("--run: nothing to measure: no classes, and no pixels of 8 bits")
    path = config.json
    if path is not None:
        with writing("--json", path):
            on_writer(lambda: write_json(path, figures))


def _prepare(config: EvaluateConfig) -> tuple[Run, Dataset]:
    with naming("--run"):
        run = load_run(config.run, step=config.checkpoint)
    run, data = guided(run, config.guidance), load_dataset(config)
    if data.images.shape[1:] != run.image_shape:
        raise UsageError(
            f"--dataset: expected images of {run.image_shape}, as the run's, "
            f"got {data.images.shape[1:]}"
        )
    if run.num_classes is not None and data.labels is None:
        raise UsageError("--data: expected labels, since the run has classes, got none")
    return run, data


def label_agreement(
    data: Dataset, samples: np.ndarray, labels: np.ndarray, seed: int = 0
) -> tuple[float, float]:
    """How often an SVC names the label of a sample, and of a real image held out from it."""
    flat = data.images.reshape(len(data.images), -1)
    seen, unseen, seen_labels, unseen_labels = train_test_split(
        flat, data.labels, test_size=0.2, random_state=seed, stratify=data.labels
    )
    judge = SVC(C=10).fit(seen, seen_labels)
    agreement = float(judge.score(samples.reshape(len(samples), -1), labels))
    return agreement, float(judge.score(unseen, unseen_labels))


def _judge(config: EvaluateConfig, run: Run, data: Dataset) -> dict[str, Any]:
    steps = config.steps or run.pretrained.schedule.num_timesteps
    if steps > run.pretrained.schedule.num_timesteps:
        raise UsageError(
            f"--steps: expected at most {run.pretrained.schedule.num_timesteps}, the run's "
            f"timesteps, got {steps}"
        )
    labels = cycle_labels(run, config.num)
    assert labels is not None
    samples = draw_samples(
        jax.random.key(config.seed),
        run,
        run.pretrained.chain(steps),
        config.num,
        SAMPLERS[config.sampler](),
        labels=labels,
    )
    agreement, held_out = label_agreement(data, samples, labels, config.seed)
    return {"steps": steps, "agreement": agreement, "svc_held_out": held_out}


def _is_8_bit(images: np.ndarray) -> bool:
    levels = (images.astype(np.float64) + 1) * 127.5
    # 17 grey levels of scikit-learn's digits are no bins of 1/255.
    return bool(np.allclose(levels, np.round(levels), atol=1e-3))


def _bits_per_dim(config: EvaluateConfig, run: Run, data: Dataset) -> float:
    model: Any = run.pretrained.model
    # Files are often sorted by class.
    chosen = np.random.default_rng(config.seed).permutation(len(data.images))[: config.num]

    @jax.jit
    def bound(variables, images, labels, first_sample):
        def denoise_fn(x_t, t):
            arguments = (x_t, t) if labels is None else (x_t, t, labels)
            return model.apply(variables, *arguments)

        return bits_per_dim(
            jax.random.key(config.seed),
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
        totals.append(bound(run.pretrained.variables, data.images[batch], labels, first))
    return float(np.mean(np.concatenate(totals)))
