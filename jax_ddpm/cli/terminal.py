"""What a terminal shows and sends: bars, and signals.

Python runs its signal handlers between two of its own instructions, so not while XLA compiles,
which may take minutes. A thread reads what the C handler writes, and that is at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tqdm import tqdm

from jax_ddpm.runs import Progress
from jax_ddpm.runs.callbacks import FIGURES
from jax_ddpm.training.hosts import is_writer

STOPPED = 130
"""The exit code of a command that was asked to stop, and did."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO = 0.1
"""Seconds: tools such as `timeout` signal a process, and its group, which is the process again."""
_SECONDS = 10
"""Between two lines in a log file."""


@contextmanager
def bars() -> Iterator[Callable[[Progress], None]]:
    """Shows each `Progress`, once for all processes: a bar for each piece of work in turn, or
    lines where the error stream is no terminal."""
    bar: tqdm | None = None
    current, first, shown, began, told = "", 0, 0, 0.0, 0.0

    def show(progress: Progress) -> None:
        nonlocal bar, current, first, shown, began, told
        now, (done, total, line, what) = time.monotonic(), progress
        if what != current:
            if bar is not None:
                bar.close()
            unit = "step" if what in ("training", "sampling") else "image"
            bar = tqdm(total=total, initial=done, desc=what, unit=unit, disable=None)
            current, first, shown, began, told = what, done, -1, now, 0.0
        assert bar is not None
        if bar.disable:  # no terminal
            if done != shown and (done == total or now - told >= _SECONDS):
                seconds = (now - began) * (total - done) / max(done - first, 1)
                left = f", {seconds:,.0f} s left" if line is None and first < done < total else ""
                print(f"{progress}{left}", file=sys.stderr, flush=True)
                shown, told = done, now
            return
        if line is not None:
            loss = "none finite" if line["loss"] is None else f"{line['loss']:.4f}"
            postfix = {"loss": loss, "images/s": f"{line['images_per_second']:,.0f}"}
            postfix |= {"waiting": f"{line['waiting']:.0%}"}
            postfix |= {name: f"{line[name]:.4g}" for name in FIGURES if name in line}
            bar.set_postfix(postfix, refresh=False)
        bar.update(done - bar.n)

    def quietly(progress: Progress) -> None:
        with suppress(OSError):  # a terminal that has gone
            if is_writer():
                show(progress)

    try:
        yield quietly
    finally:
        with suppress(OSError):
            if bar is not None:
                bar.close()


class Interrupts:
    """Entered around a command, in its main thread."""

    asked = False
    """Whether a signal has come."""
    saved: Callable[[], str] | None = None
    """Says what will be there after the end."""
    busy = False
    """Whether the first signal waits to be noticed in `asked`: there is something to save."""

    def __enter__(self) -> "Interrupts":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._handlers = {each: signal.signal(each, lambda *_: None) for each in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for each, handler in self._handlers.items():
            signal.signal(each, handler)
        os.close(self._writer)  # ends the thread

    def _watch(self) -> None:
        last = -_ECHO
        while data := os.read(self._reader, 1):
            now = time.monotonic()
            if data[0] not in _SIGNALS or now - last < _ECHO:
                continue
            last = now
            # Whatever is half written has another name: nothing has to be tidied up.
            if not self.busy or (self.asked and data[0] == signal.SIGINT):
                try:
                    _say(f"stopped; {self.saved()}" if self.saved else "stopped")
                    with suppress(OSError, ValueError):
                        sys.stdout.flush()
                finally:
                    os._exit(STOPPED)
            if not self.asked:
                self.asked = True
                again = "Ctrl-C again" if data[0] == signal.SIGINT else "SIGINT (Ctrl-C)"
                _say(f"stopping after this step; {again} stops at once")
        os.close(self._reader)


def _say(line: str) -> None:
    with suppress(OSError, ValueError):  # a terminal that has gone
        sys.stderr.write(f"\njax-ddpm: {line}\n")
        sys.stderr.flush()
