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
from jax_ddpm.evaluation.distances import compare, copies
from jax_ddpm.evaluation.features import FeatureNetwork, train_classifier
from jax_ddpm.evaluation.statistics import KEPT, Extracted, extract, load_statistics
from jax_ddpm.models.inception import FEATURES

_BATCH = 256
_LEARNED = 10_000
"""Images that a classifier learns at most."""


class Reference(NamedTuple):
    """Real images, as far as figures need them; `measure(images, total)` gives those."""

    network: FeatureNetwork
    real: Extracted
    """What generated images are compared with."""
    learned: Extracted
    """All real images."""
    floor: dict[str, Any]
    """The figures of real images that were held out."""
    at_most: int | None
    """How many generated images are compared; None: all."""
    halves: tuple[int, int]
    """Numbers of real images that the floor is of: the held-out ones, and those compared with."""

    def measure(self, batches: Iterable[np.ndarray], total: int) -> dict[str, Any]:
        """The figures of `total` images, uint8, of which all batches are read and none is kept."""
        found = extract(self.network, batches, min(total, self.at_most or total))
        return compare(found, self.real, self.network.main) | copies(found, self.learned)


def reference_of_images(
    data: Dataset,
    network: FeatureNetwork | None,
    num: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Real images, for `num` generated ones; without a network, a classifier's features.

    `progress` is told how many images were looked at, and of how many. Raises `FieldError` if they
    are too few to be split.
    """
    total = len(data.images)
    if total < 2:
        raise FieldError("data", "expected two images or more, half of which are held out, got 1")
    # Files are often sorted by class.
    half, rest = np.array_split(np.random.default_rng(seed).permutation(total), 2)
    # As many as there are samples; the others are looked at too, since a copy may be of any.
    held_out, unused = rest[:num], rest[num:]
    at_most = None
    if network is None:
        some = np.sort(half[:_LEARNED])
        labels = None if data.labels is None else data.labels[some]
        network = train_classifier(to_bytes(data.whole(some)), labels, seed=seed)
        at_most = len(held_out)
        unused = unused[: max(KEPT - len(half) - at_most, 0)]
    looked = 0

    def of(rows: np.ndarray) -> Extracted:
        def batches() -> Iterator[np.ndarray]:
            nonlocal looked
            for first in range(0, len(rows), _BATCH):
                batch = rows[first : first + _BATCH]
                yield to_bytes(data.whole(batch))
                looked += len(batch)
                if progress:
                    progress(looked, total)

        return extract(network, batches(), len(rows))

    one, other = of(half), of(held_out)
    learned = one.joined(other)
    if len(unused):
        learned = learned.joined(of(unused))
    floor = compare(other, one, network.main)
    halves = (len(held_out), len(half))
    return Reference(network, one if at_most else learned, learned, floor, at_most, halves)


def reference_of_file(path: str | PathLike[str], network: FeatureNetwork) -> Reference:
    """Statistics of real images that were saved, such as those that a paper publishes.

    Raises `FieldError` if the file cannot be read, or is of other features than `network`'s.
    """
    try:
        found = load_statistics(path)
    except ValueError as error:
        raise FieldError("reference", str(error)) from None
    names = {count: name for name, count in FEATURES.items()}
    if (count := len(found.mu)) not in names:
        expected = f"expected mu of {', '.join(map(str, names))} features of Inception"
        raise FieldError("reference", f"{path}: {expected}, got {count}")
    known = Extracted({names[count]: found}, np.zeros((0, count), np.float32))
    return Reference(network, known, known, {}, None, (0, 0))
