"""The measurements of a training: lines of metrics.jsonl.

A line holds the means since the line before: `loss`, `grad_norm`, and `loss_quarters`, the loss of
samples with t in each quarter of the chain. Beside them are the `learning_rate` of its last step,
and the speed. What is not yet in a line goes into the checkpoint, so that a run that was
interrupted writes the very lines of one that was not, but for the speed.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_ddpm.io.files import replace_file, write_file
from jax_ddpm.runs.model import PathLike
from jax_ddpm.runs.settings import LOG_EVERY
from jax_ddpm.training.hosts import gather, run_on_writer

_Pending = dict[str, list[Any]]  # numbers or lists of them; None: not finite


class MetricsLog:
    """Steps come in as they are dispatched; `collect` waits for them, `write` writes a line."""

    def __init__(
        self,
        path: Path,
        total: int,
        *,
        batch_size: int,
        num_timesteps: int,
        learning_rate: Callable[[int], Any],
        step: int = 0,
        pending: _Pending | None = None,
    ) -> None:
        """Resume after `step` steps with what was `pending` then; later lines are dropped."""
        self._path, self._total, self._step = path, total, step
        self._batch_size, self._learning_rate = batch_size, learning_rate
        self._num_timesteps, self._waited = num_timesteps, 0.0
        self.pending: _Pending = pending or {}
        """What was collected and is in no line yet."""
        self._coming: list[dict[str, jax.Array]] = []
        self._written, self._timed = step - self._count, step
        self._since = time.perf_counter()
        self.lines: list[dict[str, Any]] = []
        """Those of before, in the process that writes."""
        run_on_writer(self._open)

    def add(self, steps: range, metrics: dict[str, jax.Array]) -> None:
        """What a dispatch will have measured, [step] each; it is not waited for."""
        self._coming.append(metrics)
        self._step = steps.stop

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, the training waits for its images."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, something else is done, whose time is not the training's."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    @property
    def is_due(self) -> bool:
        """Whether a multiple of 50 was passed, or the end is reached."""
        passed = self._step // LOG_EVERY > self._written // LOG_EVERY
        return passed or self._step == self._total

    def collect(self) -> int | None:
        """Wait for the steps so far. The first of them that was not finite, if any."""
        bad = None
        first = self._written + self._count
        for metrics in map(self._by_quarters, gather(self._coming)):
            finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
            if bad is None and not np.all(finite):
                bad = first + int(np.argmin(finite))
            for name, values in metrics.items():
                kept = [x.tolist() if ok else None for x, ok in zip(values, finite, strict=True)]
                self.pending.setdefault(name, []).extend(kept)
            first += len(finite)
        self._coming = []
        return bad

    def write(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Make a line of what was collected, and of other `figures` by name; steps that were not
        finite are counted apart. What is returned also has `images_per_second`, `waiting`, the
        share of time that went by waiting for images, and `seconds_left`, which are not kept: they
        say more of the machine than of the run."""
        line: dict[str, Any] = {"step": self._step}
        means = {}
        for name, values in self.pending.items():
            kept = [value for value in values if value is not None]
            means[name] = np.mean(kept, axis=0).tolist() if kept else None
            if len(kept) < len(values):
                line["dropped"] = len(values) - len(kept)
        line |= {"loss": means.get("loss"), "grad_norm": means.get("grad_norm")}
        parts, shares = (means.get(f"{name}_quarters") or [0.0] * 4 for name in ("loss", "share"))
        line["loss_quarters"] = [
            part / share if share else None for part, share in zip(parts, shares, strict=True)
        ]
        line["learning_rate"] = float(self._learning_rate(self._step - 1))
        speed = self._speed()
        line["steps_per_second"] = speed["steps_per_second"]
        line |= figures
        text = (json.dumps(line) + "\n").encode()
        run_on_writer(lambda: write_file(self._path, text, "ab"))
        self.pending, self._written = {}, self._step
        self._timed, self._since, self._waited = self._step, time.perf_counter(), 0.0
        return line | speed

    def _by_quarters(self, metrics: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Each quarter's contribution to the mean loss, and the share of samples whose t falls in
        it, in place of the losses of single samples."""
        rest = dict(metrics)
        losses, t = rest.pop("losses"), rest.pop("t")
        within = 4 * t // self._num_timesteps == np.arange(4)[:, None, None]
        parts = np.where(within, losses, 0).mean(axis=-1)
        return rest | {"loss_quarters": parts.T, "share_quarters": within.mean(axis=-1).T}

    def _speed(self) -> dict[str, float]:
        """What differs from one time to the next."""
        elapsed = max(time.perf_counter() - self._since, 1e-9)
        rate = (self._step - self._timed) / elapsed
        left = (self._total - self._step) / rate if rate else 0.0
        return {
            "steps_per_second": round(rate, 2),
            "images_per_second": round(rate * self._batch_size, 1),
            "waiting": round(self._waited / elapsed, 4),
            "seconds_left": round(left, 1),
        }

    def _open(self) -> None:
        """Drop the lines after the checkpoint: they will be written again."""
        self.lines = [line for line in read_metrics(self._path) if line["step"] <= self._written]
        text = "".join(json.dumps(line) + "\n" for line in self.lines)
        replace_file(self._path, text.encode())

    @property
    def _count(self) -> int:
        return len(next(iter(self.pending.values()), []))


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what is damaged, or was left unfinished, is no line."""
    lines = []
    path = Path(path)
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for each in text.splitlines():
        try:
            line = json.loads(each)
        except ValueError:
            continue
        if isinstance(line, dict) and type(line.get("step")) is int and "loss" in line:
            lines.append(line)
    return lines


def damaged_lines(path: Path) -> int:
    """How many lines of a metrics.jsonl cannot be read, not counting an unfinished last one."""
    count = path.read_bytes().count(b"\n") if path.exists() else 0
    return max(0, count - len(read_metrics(path)))
