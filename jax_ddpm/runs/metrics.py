"""The measurements of a training: lines of metrics.jsonl, and how far it is.

A line holds means since the line before, among them `loss_quarters`, the loss of samples with t in
each quarter of the chain. Measurements that are in no line yet go into the checkpoint, so an
interrupted run writes the lines of an uninterrupted one, but for the speed.
"""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jax_ddpm.io.files import replace_file, write_file
from jax_ddpm.runs.model import PathLike
from jax_ddpm.runs.programs import learning_rate
from jax_ddpm.runs.settings import Settings
from jax_ddpm.training.hosts import gather, run_on_writer


class Progress(NamedTuple):
    """The argument of a progress callback; as text, a line for the terminal.

    Attributes:
      done, total: steps of a training or a chain, or images; `total` is 0 if it is not known.
      line: of a training, the newest line of metrics.jsonl, as in `read_metrics`, with
        `images_per_second`, `seconds_left` and `waiting`, the share of time spent on images.
      what: the piece of work, such as "compiling", "training" or "samples".
    """

    done: int
    total: int
    line: dict[str, Any] | None = None
    what: str = "sampling"

    def __str__(self) -> str:
        """`training: 300 of 1,500, loss 0.0521, 1,204 images/s, 41 s left`."""
        if not self.total:
            return f"{self.what}…"
        text = f"{self.what}: {self.done:,} of {self.total:,}"
        if self.line is None:
            return text
        loss = "not finite" if self.line["loss"] is None else f"{self.line['loss']:.4f}"
        speed, left = self.line["images_per_second"], self.line["seconds_left"]
        return f"{text}, loss {loss}, {speed:,.0f} images/s, {left:,.0f} s left"


class MetricsLog:
    """Takes the measurements of each dispatch, and makes lines of them."""

    def __init__(
        self, path: Path, settings: Settings, num_timesteps: int, step: int, pending: dict[str, Any]
    ) -> None:
        """After `step` steps, with what was `pending` then."""
        self._path, self._settings, self._num_timesteps = path, settings, num_timesteps
        self.pending = pending  # by name, a value of each step; None: not finite
        self.line: dict[str, Any] | None = None  # the newest
        self.done, self._sent, self._coming = step, step, []  # steps known to be taken, and sent
        self._restart()

    def _restart(self) -> None:
        self._first, self.since, self.waited = self._sent, time.perf_counter(), 0.0

    def add(self, steps: range, metrics: dict[str, Any]) -> None:
        """What the dispatch of these steps will have measured. Waits for the one before it, so the
        devices have one at work and one to come."""
        jax.block_until_ready([before for _, before in self._coming[-1:]])
        self._coming.append((steps, metrics))
        self.done, self._sent = steps.start, steps.stop

    def collect(self) -> int | None:
        """Wait for the steps so far. The first whose loss or gradient was not finite, if any."""
        bad = None
        measured = gather([metrics for _, metrics in self._coming])
        for (steps, _), metrics in zip(self._coming, measured, strict=True):
            # In place of the losses of single samples, each quarter's contribution to their mean,
            # and the share of samples whose t falls in it.
            losses, t = metrics.pop("losses"), metrics.pop("t")
            within = 4 * t // self._num_timesteps == np.arange(4)[:, None, None]
            metrics["loss_quarters"] = np.where(within, losses, 0).mean(axis=-1).T
            metrics["share_quarters"] = within.mean(axis=-1).T
            finite = np.isfinite(metrics["loss"]) & np.isfinite(metrics["grad_norm"])
            if bad is None and not np.all(finite):
                bad = steps[int(np.argmin(finite))]
            for name, values in metrics.items():
                kept = [x.tolist() if ok else None for x, ok in zip(values, finite, strict=True)]
                self.pending.setdefault(name, []).extend(kept)
        self.done, self._coming = self._sent, []
        return bad

    def write(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Write a line of what was collected, and of `figures`. Also returns `images_per_second`,
        `waiting` (for images, a share of time) and `seconds_left`."""
        line: dict[str, Any] = {"step": self._sent}
        if dropped := self.pending["loss"].count(None):
            line["dropped"] = dropped
        for name in ("loss", "grad_norm", "loss_quarters", "share_quarters"):
            known = [x for x in self.pending[name] if x is not None]
            line[name] = np.mean(known, axis=0).tolist() if known else None
        shares, parts = line.pop("share_quarters") or [0] * 4, line["loss_quarters"] or [0] * 4
        quarters = [x / share if share else None for x, share in zip(parts, shares, strict=True)]
        rate: Any = learning_rate(self._settings)(self._sent - 1)
        elapsed = time.perf_counter() - self.since
        speed = (self._sent - self._first) / elapsed
        line |= {"loss_quarters": quarters, "learning_rate": float(rate)}
        line |= {"steps_per_second": round(speed, 2), **figures}
        run_on_writer(lambda: write_file(self._path, _encoded(line), "ab"))
        left = (self._settings.steps - self._sent) / max(speed, 1e-9)
        images_per_second = round(speed * self._settings.batched(), 1)
        self.line = line | {"images_per_second": images_per_second}
        self.line |= {"waiting": round(self.waited / elapsed, 4), "seconds_left": round(left, 1)}
        self.pending = {}
        self._restart()
        return self.line


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl, without damaged lines.

    Args:
      path: of the file; without a file there are no lines.

    Returns:
      A dictionary for each line: its `step`, the means since the line before of `loss`,
        `grad_norm` and `loss_quarters` (the loss for t in each quarter of the chain; None: not
        finite), `learning_rate`, `steps_per_second`, and the figures of an evaluation.

    Examples:
      >>> from pathlib import Path
      >>> _ = Path("metrics.jsonl").write_text('{"step": 50, "loss": 0.5}')
      >>> [(line["step"], line["loss"]) for line in runs.read_metrics("metrics.jsonl")]
      [(50, 0.5)]
    """
    lines, path = [], Path(path)
    text = path.read_bytes().decode(errors="replace") if path.exists() else ""
    for each in text.splitlines():
        with suppress(ValueError):
            line = json.loads(each)
            if isinstance(line, dict) and type(line.get("step")) is int and "loss" in line:
                lines.append(line)
    return lines


def keep_lines(path: Path, step: int) -> list[dict[str, Any]]:
    """Keep the lines of a metrics.jsonl up to this step, and nothing that is damaged."""
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    replace_file(path, b"".join(map(_encoded, lines)))
    return lines


def _encoded(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line) + "\n").encode()
