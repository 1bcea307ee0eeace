"""An array that stays on the disk: rows are read when asked for, and not kept in memory."""

import mmap
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["MappedRows"]

_KEPT = 2**26
"""Bytes of the file that a process holds before it lets go of them. They stay in the system's
cache."""
_AROUND = 2**16
"""What Linux maps at least, around a byte that is touched."""


class MappedRows:
    """Rows of a memory-mapped array, with as much of an array's interface as a training needs.

    A process that reads rows at random would in the end hold the whole file; this one holds about
    64 MiB of it. Safe in several threads.
    """

    def __init__(self, array: np.memmap) -> None:
        self._mapping: mmap.mmap = vars(array)["_mmap"]
        self._array, self._held = np.asarray(array), 0
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
        row = self._array[:1].nbytes
        self._held += max(row, _AROUND) * (images.nbytes // row)
        if self._held > _KEPT and hasattr(mmap, "MADV_DONTNEED"):
            self._held = 0
            self._mapping.madvise(mmap.MADV_DONTNEED)
        return images
