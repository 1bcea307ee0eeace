"""An array that stays on the disk: rows are read when asked for, and not kept in memory."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MappedRows"]

_KEPT = 2**27
"""Bytes that are read before the process lets go of its pages. They stay in the system's cache."""


class MappedRows:
    """Rows of a memory-mapped array, with as much of an array's interface as a training needs.

    A process that reads rows at random would in the end hold the whole file; this one holds little
    more than 128 MiB of it. Safe in several threads.
    """

    def __init__(self, array: np.memmap) -> None:
        self._mapping: mmap.mmap = vars(array)["_mmap"]
        self._array, self._read = np.asarray(array), 0
        self.shape, self.dtype = array.shape, array.dtype

    @classmethod
    def of_file(cls, path: Path, shape: tuple[int, ...], dtype: Any = np.uint8) -> "MappedRows":
        """Those of a raw file."""
        return cls(np.memmap(path, dtype, "r", shape=shape))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Copies of rows, as an array gives them."""
        images = np.array(self._array[rows])
        self._read += images.nbytes
        if self._read > _KEPT and hasattr(mmap, "MADV_DONTNEED"):
            self._read = 0
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return images
