"""What a measurement compares samples with, and by which features."""

import os
from collections.abc import Callable

from jax_ddpm._errors import Field, FieldError
from jax_ddpm.data import Dataset
from jax_ddpm.evaluation import FeatureNetwork, load_inception, save_statistics
from jax_ddpm.evaluation.inception import VARIABLE, WHERE
from jax_ddpm.evaluation.reference import Reference, reference_of_file, reference_of_images
from jax_ddpm.runs.metrics import Progress
from jax_ddpm.runs.run import PathLike
from jax_ddpm.training.hosts import run_on_all, run_on_writer


def feature_network(
    image_shape: tuple[int, ...], inception: PathLike | None
) -> FeatureNetwork | None:
    """Inception, where its weights are given and images are RGB; None: a classifier is needed."""
    if image_shape[-1] != 3 and inception is not None:
        problem = f"expected images of 3 channels, which Inception knows, got {image_shape[-1]}"
        hint = "; without it, they are compared by the features of a small classifier"
        raise FieldError("inception", problem + hint)
    if image_shape[-1] != 3 or not (inception or os.environ.get(VARIABLE)):
        return None
    try:
        return load_inception(inception)
    except FieldError as error:
        raise FieldError("inception", *error.problem) from None
    except ImportError as error:  # torch, for a pickle
        raise FieldError("inception", str(error)) from None


def open_reference(
    image_shape: tuple[int, int, int],
    data: Dataset | None,
    inception: PathLike | None,
    reference: PathLike | None,
    statistics: PathLike | None,
    num: int,
    seed: int,
    progress: Callable[[Progress], None] | None,
) -> Reference:
    """Real images or the statistics of some, for `num` samples; `evaluate` says what the rest are.

    Raises `FieldError` naming what is missing or does not fit.
    """
    network = run_on_all(lambda: feature_network(image_shape, inception))
    if statistics is not None and (network is None or reference is not None):
        problem = "expected Inception's weights and real images, got"
        problem += " no weights" if network is None else " statistics for these"
        raise FieldError("statistics", problem)
    if reference is not None:
        if network is None:
            problem = "statistics are of Inception's features, and come with "
            raise FieldError("reference", problem, Field("inception"), f": {WHERE}")
        return run_on_all(lambda: reference_of_file(reference, network))
    if data is None:
        raise FieldError("data", "expected real images, or ", Field("reference"), ", got neither")

    def tell(done: int, total: int) -> None:
        if progress:
            progress(Progress(done, total, what="real images"))

    target = reference_of_images(data, network, num, seed=seed, progress=tell)
    if statistics is not None:
        found = target.real.statistics[target.network.main]
        run_on_writer(lambda: save_statistics(statistics, found))
    return target
