"""Progress on the error stream: a bar on a terminal, a line now and then in a log file."""

import sys
from contextlib import suppress
from typing import Any

from tqdm import tqdm

from jax_ddpm.runs import Progress
from jax_ddpm.training.hosts import is_writer

__all__ = ["Bar"]

_SECONDS = 10
"""Between two lines in a log file."""


class Bar:
    """Shows the `Progress` that it is called with; shown once for all processes."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._bar: tqdm | None = None

    def __call__(self, progress: Progress) -> None:
        with suppress(OSError):  # a terminal that has gone
            if self._bar is None:
                self._bar = _open(self._what, progress)
            elif progress.line is not None:
                loss = progress.line["loss"]
                shown = "none finite" if loss is None else f"{loss:.4f}"
                self._bar.set_postfix(loss=shown, refresh=False)
            self._bar.update(progress.done - self._bar.n)

    def __enter__(self) -> "Bar":
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            if self._bar is not None:
                self._bar.close()


def _open(what: str, progress: Progress) -> tqdm:
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=progress.total,
        initial=progress.done,
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
