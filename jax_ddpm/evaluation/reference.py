"""What generated images are measured against: real images, or the statistics of some.

Without Inception a classifier learns one half of the real images. The generated images, and as many
of the other half, are compared with it: a distance of few images is larger than that of many. What
the other half scores is the floor. With Inception they are compared with all real images.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_ddpm._errors import FieldError
from jax_ddpm.data import Dataset, to_bytes
from jax_ddpm.evaluation.distances import compare, copies
from jax_ddpm.evaluation.features import (
    KEPT,
    Extracted,
    FeatureNetwork,
    PathLike,
    extract,
    load_statistics,
    train_classifier,
)
from jax_ddpm.models.inception import FEATURES

_BATCH = 256
_LEARNED = 10_000  # images, at most, of which a classifier learns


class Reference(NamedTuple):
    """Real images, as far as figures need them."""

    network: FeatureNetwork
    real: Extracted
    """What generated images are compared with."""
    learned: np.ndarray
    """Features of all real images, which generated ones may be copies of, as far as kept."""
    floor: dict[str, Any]
    """The figures of real images that were held out."""
    at_most: int | None
    """How many generated images are compared; None: all."""
    how: dict[str, str]
    """What is compared with what, for the recipe of a measurement."""

    def measure(self, batches: Iterable[np.ndarray], total: int) -> dict[str, Any]:
        """The figures of `total` images, uint8."""
        found = extract(self.network, batches, min(total, self.at_most or total))
        return compare(found, self.real, self.network.main) | copies(found.kept, self.learned)


def reference_of_images(
    data: Dataset,
    network: FeatureNetwork | None,
    num: int,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reference:
    """Real images, for `num` generated ones; without a network, a classifier's features.
    `progress` is told how many images were looked at, and of how many."""
    total, looked = len(data), 0
    if total < 2:
        raise FieldError("data", "expected two images or more, half of which are held out, got 1")
    # Files are often sorted by class.
    half, rest = np.array_split(np.random.default_rng(seed).permutation(total), 2)
    # As many as there are samples; the others are looked at too, since a copy may be of any.
    held_out, others = rest[:num], rest[num:]
    at_most, how = None, {"reference": f"{total:,}"}
    if network is None:
        some = np.sort(half[:_LEARNED])
        labels = None if data.labels is None else data.labels[some]
        network = train_classifier(to_bytes(data.whole(some)), labels, seed=seed)
        at_most = len(held_out)
        how = {"reference": f"{len(half):,}", "compared": f"{at_most:,} samples"}
        others = others[: max(KEPT - len(half) - at_most, 0)]
    how["reference"] += f" of the {total:,} images of {data.source}, SHA-256 {data.digest()}"
    how["held out"] = f"{len(held_out):,} real images against {len(half):,} others"

    def read(rows: np.ndarray) -> np.ndarray:
        nonlocal looked
        looked += len(rows)
        if progress:
            progress(looked, total)
        return to_bytes(data.whole(rows))

    parts = []
    for rows in filter(len, (half, held_out, others)):
        batches = map(read, np.split(rows, range(_BATCH, len(rows), _BATCH)))
        parts.append(extract(network, batches, len(rows)))
    learned, floor = reduce(Extracted.joined, parts), compare(parts[1], parts[0], network.main)
    real = parts[0] if at_most else learned
    return Reference(network, real, learned.kept, floor, at_most, how)


def reference_of_file(path: PathLike, network: FeatureNetwork) -> Reference:
    """Statistics of real images that were saved, such as those that a paper publishes."""
    try:
        found = load_statistics(path)
    except ValueError as error:
        raise FieldError("reference", str(error)) from None
    name, none = str(len(found.mu)), np.zeros((0, len(found.mu)))
    if name not in FEATURES:
        expected = "expected mu of 64, 192, 768, 2048 features of Inception"
        raise FieldError("reference", f"{path}: {expected}, got {name}")
    how = {"reference": f"{path}, SHA-256 {sha256(Path(path).read_bytes()).hexdigest()}"}
    return Reference(network, Extracted({name: found}, none), none, {}, None, how)
