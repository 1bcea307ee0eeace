"""An array that stays in its file: rows are read when they are asked for, and not kept."""

import os
import weakref
from pathlib import Path
from typing import Any

import numpy as np


class FileRows:
    """Rows of an array in a file, in C order from `offset` on, with as much of an array's interface
    as a training needs.

    They are read by position and not mapped: how much of a mapped file a process holds is up to the
    system, and of rows in random order it is soon all. Safe in several threads; needs POSIX.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any = np.uint8, offset: int = 0):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._path, self._offset, self._indices = path, offset, np.arange(len(self))
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    @classmethod
    def of_array(cls, array: np.memmap) -> "FileRows":
        """Those of a mapped array in C order, as it was opened or with more axes of length 1."""
        return cls(Path(str(array.filename)), array.shape, array.dtype, array.offset)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        """As an array's. Raises `OSError` where the file has become shorter."""
        chosen = self._indices[rows]
        images = np.empty((chosen.size, *self.shape[1:]), self.dtype)
        for image, row in zip(images, chosen.flat, strict=True):
            read = os.preadv(self._file, [image], self._offset + row * image.nbytes)
            if read != image.nbytes:
                raise OSError(None, "was cut short while it was read", str(self._path))
        return images.reshape(*np.shape(chosen), *self.shape[1:])
