"""Images in: where they come from, and the order that a training sees them in."""

from jax_ddpm.data.order import batch_indices, load_batch
from jax_ddpm.data.sources import DATASETS, Dataset, load_dataset

__all__ = ["DATASETS", "Dataset", "batch_indices", "load_batch", "load_dataset"]
