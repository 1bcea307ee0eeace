"""What a terminal shows and sends: lines for errors and warnings, bars, and signals.

Python runs its signal handlers between two of its own instructions, so not while XLA compiles,
which may take minutes. A thread reads what the C handler writes, and that is at once.
"""

import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

from jax_ddpm._errors import Field, FieldError
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


class UsageError(Exception):
    """What the user asked for cannot be done; the message is one line that names the flag."""


@contextmanager
def naming(**flags: str) -> Iterator[None]:
    """Spells the settings in a `FieldError` as flags: `--like-this`, or as `flags` say."""

    def spell(field: Field) -> str:
        flag = flags.get(field.name, "--" + field.name.replace("_", "-"))
        return flag if field.value in (None, True) else f"{flag} {field.value}"

    try:
        yield
    except FieldError as error:
        raise UsageError(error.spelled(spell)) from None


@contextmanager
def warning_lines() -> Iterator[None]:
    """Inside, a warning is a line on the error stream."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"jax-ddpm: {message}", file=sys.stderr)
        yield


@contextmanager
def writing(flag: str, path: Path) -> Iterator[None]:
    """Says which flag named what cannot be written, and why it cannot."""
    try:
        yield
    except OSError as error:
        problem = error.strerror or error
        raise UsageError(f"{flag}: cannot write {error.filename or path}: {problem}") from None


def check_file(flag: str, path: Path | None, *suffixes: str) -> None:
    """Raises `UsageError` unless `path` is None or can be written: before the work, not after."""
    if path is None:
        return
    if suffixes and path.suffix not in suffixes:
        raise UsageError(f"{flag}: expected a {' or a '.join(suffixes)}, got {path}")
    if path.is_dir():
        raise UsageError(f"{flag}: expected a file, got the folder {path}")
    if not path.parent.is_dir():
        raise UsageError(f"{flag}: no such folder: {path.parent}")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{flag}: cannot write {path}: {error.strerror or error}") from None


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
