"""Images: reading, preparation, and the batches of a training."""

from jax_ddpm.data.batches import batch_indices, load_batch, random_crop, random_flip
from jax_ddpm.data.dataset import Dataset, Preparation, to_bytes, to_float
from jax_ddpm.data.sources import DATASETS, load_dataset

__all__ = [
    "DATASETS",
    "Dataset",
    "Preparation",
    "batch_indices",
    "load_batch",
    "load_dataset",
    "random_crop",
    "random_flip",
    "to_bytes",
    "to_float",
]
