"""Features of many images: in batches over all devices, gathered so that memory does not grow."""

from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from jax_ddpm.data import load_batch
from jax_ddpm.evaluation.distances import InceptionScores, Score
from jax_ddpm.evaluation.networks import FeatureNetwork
from jax_ddpm.evaluation.statistics import Statistics, statistics
from jax_ddpm.training.hosts import gather
from jax_ddpm.training.sharding import data_sharding, device_mesh, replicated

KEPT = 10_000
"""Of so many images the features themselves are kept: what compares image with image needs them."""
LOGITS = "logits_unbiased"
_BATCH = 64
_SCORED = 100


class Extracted(NamedTuple):
    """What is left of the features of a set of images."""

    statistics: dict[str, Statistics]
    """Of all images, by the names of the features."""
    kept: np.ndarray
    """The main features of the first images, at most `KEPT`: float32 [image, feature]."""
    score: Score | None
    """The inception score, where there are logits, and ten images or more for each of its parts."""

    def joined(self, other: "Extracted") -> "Extracted":
        """Of both sets together; they have no score."""
        both = {name: each.joined(other.statistics[name]) for name, each in self.statistics.items()}
        return Extracted(both, np.concatenate([self.kept, other.kept])[:KEPT], None)


def extract(network: FeatureNetwork, batches: Iterable[np.ndarray], total: int) -> Extracted:
    """Features of `total` images, which come in batches of any size, uint8, in one pass."""
    gathered: dict[str, Statistics] = {}
    scores, kept = InceptionScores(total) if total >= _SCORED else None, []
    for features in feature_batches(network, batches):
        logits = features.pop(LOGITS, None)
        if scores is not None and logits is not None:
            scores.add(logits)
        if sum(map(len, kept)) < KEPT:
            kept.append(features[network.main].astype(np.float32))
        for name, rows in features.items():
            here = statistics(rows)
            gathered[name] = gathered[name].joined(here) if name in gathered else here
    score = scores.score if scores is not None and scores.seen else None
    return Extracted(gathered, np.concatenate(kept)[:KEPT], score)


def feature_batches(
    network: FeatureNetwork, batches: Iterable[np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """Float32 features by name, for batches of one size, the last of which is filled up."""
    devices = jax.device_count()
    size = -(-_BATCH // devices) * devices
    mesh = device_mesh(size)
    to_devices, program = _programs(network.apply_fn, mesh)
    variables, data = to_devices(network.variables), data_sharding(mesh)

    def fetched(features: Any, count: int) -> dict[str, np.ndarray]:
        return {name: rows[:count] for name, rows in gather(features).items()}

    ahead = None  # so that the devices have work while the host gathers
    for images in _of_size(batches, size):
        placed = load_batch(images, np.resize(np.arange(len(images)), size), data)
        begun = (program(variables, placed), len(images))
        if ahead is not None:
            yield fetched(*ahead)
        ahead = begun
    if ahead is not None:
        yield fetched(*ahead)


@lru_cache(4)
def _programs(apply_fn: Any, mesh: Mesh) -> tuple[Any, Any]:
    """Weights to every device, and features of a batch that is split over them; compiled once."""
    whole, data = replicated(mesh), data_sharding(mesh)
    return (
        jax.jit(lambda tree: tree, out_shardings=whole),
        jax.jit(apply_fn, in_shardings=(whole, data), out_shardings=data),
    )


def _of_size(batches: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    """The same images in batches of `size`, and a last one of what is left."""
    waiting: list[np.ndarray] = []
    for batch in batches:
        waiting.append(batch)
        while sum(map(len, waiting)) >= size:
            images = np.concatenate(waiting)
            yield images[:size]
            waiting = [images[size:]]
    if sum(map(len, waiting)):
        yield np.concatenate(waiting)
