"""Progress on the error stream: a bar on a terminal, a line now and then in a log file."""

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from tqdm import tqdm

from jax_ddpm.runs import Progress
from jax_ddpm.runs.callbacks import FIGURES
from jax_ddpm.training.hosts import is_writer

_SECONDS = 10
"""Between two lines in a log file."""


@contextmanager
def bar(what: str, unit: str = "step") -> Iterator[Callable[[Progress], None]]:
    """Shows each `Progress` that it is called with, once for all processes."""
    shown: list[tqdm] = []

    def show(progress: Progress) -> None:
        with suppress(OSError):  # a terminal that has gone
            if not shown:
                shown.append(_open(what, unit, progress))
            if progress.line is not None:
                line = progress.line
                loss = "none finite" if line["loss"] is None else f"{line['loss']:.4f}"
                speed = f"{line['images_per_second']:,.0f}"
                waiting = f"{line['waiting']:.0%}"
                postfix = {"loss": loss, "images/s": speed, "waiting": waiting}
                postfix |= {name: f"{line[name]:.4g}" for name in FIGURES if name in line}
                shown[0].set_postfix(postfix, refresh=False)
            shown[0].update(progress.done - shown[0].n)

    try:
        yield show
    finally:
        with suppress(OSError):
            for each in shown:
                each.close()


@contextmanager
def bars() -> Iterator[Callable[[Progress], None]]:
    """A bar for each piece of work, one after the other."""
    with ExitStack() as stack:
        shown: dict[str, Callable[[Progress], None]] = {}

        def show(progress: Progress) -> None:
            what = progress.what
            if what not in shown:
                stack.close()  # that of what was done before
                unit = "step" if what == Progress._field_defaults["what"] else "image"
                shown[what] = stack.enter_context(bar(what, unit))
            shown[what](progress)

        yield show


def _open(what: str, unit: str, progress: Progress) -> tqdm:
    on_terminal = sys.stderr.isatty()
    return tqdm(
        total=progress.total,
        initial=progress.done,
        desc=what,
        unit=unit,
        disable=not is_writer(),
        file=sys.stderr if on_terminal else _Lines(sys.stderr),  # pyright: ignore
        mininterval=0.1 if on_terminal else _SECONDS,
        bar_format=None
        if on_terminal
        else "{desc}: {n_fmt} of {total_fmt}, {rate_fmt}, {remaining} left{postfix}",
    )


class _Lines:
    """Writes each state of a bar as a line of its own."""

    def __init__(self, stream: Any) -> None:
        self._stream, self._last = stream, ""

    def write(self, text: str) -> None:
        text = text.strip()
        if text and text.partition(",")[0] != self._last:  # how far it is
            self._stream.write(text + "\n")
            self._last = text.partition(",")[0]

    def flush(self) -> None:
        self._stream.flush()
