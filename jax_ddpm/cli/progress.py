"""Progress on the error stream: a bar on a terminal, a line now and then in a log file."""

import sys
from typing import Any

from tqdm import tqdm

from jax_ddpm.training.hosts import is_writer

__all__ = ["progress"]

_SECONDS = 10
"""Between two lines in a log file."""


def progress(total: int, what: str, *, done: int = 0) -> tqdm:
    """Of `total` steps, `done` of which were taken before; shown once for all processes."""
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=done,
        desc=what,
        unit="step",
        disable=not is_writer(),
        file=sys.stderr if on_terminal else _Lines(sys.stderr),  # pyright: ignore
        mininterval=0.1 if on_terminal else _SECONDS,
        bar_format=None if on_terminal else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}{postfix}",
    )


class _Lines:
    """Writes each state of a bar as a line of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip() + "\n")

    def flush(self) -> None:
        self._stream.flush()
