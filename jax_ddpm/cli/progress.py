"""Progress on the error stream: a bar on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

from jax_ddpm.runs import Progress
from jax_ddpm.runs.callbacks import FIGURES
from jax_ddpm.training.hosts import is_writer

_SECONDS = 10
"""Between two lines in a log file."""


@contextmanager
def bars() -> Iterator[Callable[[Progress], None]]:
    """Shows each `Progress`, once for all processes: a bar for each piece of work in turn."""
    shown: dict[str, tqdm] = {}

    def close() -> None:
        with suppress(OSError):  # a terminal that has gone
            for each in shown.values():
                each.close()

    def show(progress: Progress) -> None:
        with suppress(OSError):
            if progress.what not in shown:
                close()  # that of what was done before
                shown[progress.what] = _open(progress)
            bar = shown[progress.what]
            if progress.line is not None:
                line = progress.line
                loss = "none finite" if line["loss"] is None else f"{line['loss']:.4f}"
                postfix = {"loss": loss, "images/s": f"{line['images_per_second']:,.0f}"}
                postfix |= {"waiting": f"{line['waiting']:.0%}"}
                postfix |= {name: f"{line[name]:.4g}" for name in FIGURES if name in line}
                bar.set_postfix(postfix, refresh=False)
            bar.update(progress.done - bar.n)

    try:
        yield show
    finally:
        close()


def _open(progress: Progress) -> tqdm:
    on_terminal = sys.stderr.isatty()
    in_lines = "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}"
    return tqdm(
        total=progress.total,
        initial=progress.done,
        desc=progress.what,
        unit="step" if progress.what in ("training", "sampling") else "image",
        disable=not is_writer(),
        file=sys.stderr if on_terminal else _Lines(sys.stderr),  # pyright: ignore
        mininterval=0.1 if on_terminal else _SECONDS,
        bar_format=None if on_terminal else in_lines,
    )


class _Lines:
    """Writes each state of a bar as a line of its own."""

    def __init__(self, stream: Any) -> None:
        self.flush, self._stream, self._last = stream.flush, stream, ""

    def write(self, text: str) -> None:
        done = text.strip().partition(",")[0]
        if done not in ("", self._last):
            self._stream.write(text.strip() + "\n")
            self._last = done
