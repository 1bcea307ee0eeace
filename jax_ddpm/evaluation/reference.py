"""What generated images are measured against: real images, or the statistics of some.

Without Inception the real images are split in two. A classifier learns one half; the generated
images, and as many of the other half, are compared with it: like with like, since a distance of
few images is larger than that of many. What the other half scores is the floor, which a perfect
model reaches. With Inception the generated images are compared with all real ones, as is usual.
"""

from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Dataset, to_bytes
from jax_ddpm.evaluation.classifier import train_classifier
from jax_ddpm.evaluation.comparison import compare, compare_statistics, copies
from jax_ddpm.evaluation.extraction import KEPT, Extracted, extract
from jax_ddpm.evaluation.networks import FeatureNetwork
from jax_ddpm.evaluation.statistics import load_statistics
from jax_ddpm.models.inception import FEATURES

_BATCH = 256
_LEARNED = 10_000
"""Images that a classifier learns at most."""


class Reference(NamedTuple):
    """Real images, as far as figures need them; `measure(images, total)` gives those."""

    network: FeatureNetwork
    real: Extracted
    """What generated images are compared with: statistics, and features if there are any."""
    learned: Extracted | None
    """All real images."""
    floor: dict[str, Any]
    """The figures of real images that were held out."""
    at_most: int | None
    """How many generated images are compared; None: all."""
    halves: tuple[int, int] = (0, 0)
    """How many real images those that were held out are compared with, and how many were."""

    def measure(self, batches: Iterable[np.ndarray], total: int) -> dict[str, Any]:
        """The figures of `total` images, uint8, which come in batches and are not kept."""
        main = self.network.main
        count = min(total, self.at_most or total)
        found = extract(self.network, _first(batches, count), count)
        if self.learned is None:
            return compare_statistics(found, self.real.statistics, main)
        return compare(found, self.real, main) | copies(found, self.learned)


def reference_of_images(
    data: Dataset,
    network: FeatureNetwork | None,
    num: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Real images, for `num` generated ones; without a network, a classifier's features.

    `progress` is told how many images were looked at, and of how many.

    Raises `FieldError` if they are too few to be split.
    """
    total = len(data.images)
    if total < 2:
        raise FieldError("data", "expected two images or more, half of which are held out, got 1")
    # Files are often sorted by class.
    order = np.random.default_rng(seed).permutation(total)
    half, rest = np.array_split(order, 2)
    at_most = None
    if network is None:
        some = np.sort(half[:_LEARNED])
        labels = None if data.labels is None else data.labels[some]
        network = train_classifier(to_bytes(data.whole(some)), labels, seed=seed)
        at_most = min(num, len(rest))
    # As many as there are samples; the others are looked at too, since a copy may be of any.
    rest, unused = rest[:num], rest[num:]
    if at_most is not None:
        unused = unused[: max(KEPT - len(half) - len(rest), 0)]
    looked = 0

    def batches(rows: np.ndarray) -> Iterator[np.ndarray]:
        nonlocal looked
        for first in range(0, len(rows), _BATCH):
            if progress:
                progress(looked, total)
            yield to_bytes(data.whole(rows[first : first + _BATCH]))
            looked += len(rows[first : first + _BATCH])
        if progress:
            progress(looked, total)

    one, other = (extract(network, batches(rows), len(rows)) for rows in (half, rest))
    floor = compare(other, one, network.main)
    learned = one.joined(other)
    if len(unused):
        learned = learned.joined(extract(network, batches(unused), len(unused)))
    real = one if at_most else learned
    return Reference(network, real, learned, floor, at_most, (len(half), len(rest)))


def reference_of_file(path: str | PathLike[str], network: FeatureNetwork) -> Reference:
    """Statistics of real images that were saved, such as those that a paper publishes.

    Raises `FieldError` if the file cannot be read, or is of other features than `network`'s.
    """
    try:
        found = load_statistics(path)
    except ValueError as error:
        raise FieldError("reference", str(error)) from None
    for name, count in FEATURES.items():
        if count == len(found.mu):
            empty = np.zeros((0, count), np.float32)
            return Reference(network, Extracted({name: found}, empty, None), None, {}, None)
    expected = f"expected mu of {', '.join(map(str, FEATURES.values()))} features of Inception"
    raise FieldError("reference", f"{path}: {expected}, got {len(found.mu)}")


def _first(batches: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The first `count` images; those after them stay with whoever gives the batches."""
    seen = 0
    for batch in batches:
        yield batch[: count - seen]
        seen += len(batch)
        if seen >= count:
            return
