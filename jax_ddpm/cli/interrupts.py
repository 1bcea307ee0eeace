"""SIGTERM and Ctrl-C. The first asks; a second Ctrl-C, or the first while nothing is lost, ends.

Python runs its handlers between two of its own instructions, so not while XLA compiles, which
may take minutes. A thread reads what the C handler writes, and that is at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress

STOPPED = 130
"""The exit code of a command that was asked to stop, and did."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO = 0.1
"""Seconds: tools such as `timeout` signal a process, and its group, which is the process again."""


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
