"""The measurements of a training: lines of metrics.jsonl, and how far it is.

A line holds means since the line before: `loss`, `grad_norm`, and `loss_quarters`, the loss of
samples with t in each quarter of the chain. Beside them are the `learning_rate` of its last step,
the speed, and the figures of callbacks. Measurements that are in no line yet go into the
checkpoint, so an interrupted run writes the lines of an uninterrupted one, but for the speed.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jax_ddpm.io.files import replace_file, write_file
from jax_ddpm.runs.model import PathLike
from jax_ddpm.runs.programs import learning_rate
from jax_ddpm.runs.settings import Settings
from jax_ddpm.training.hosts import gather, run_on_writer


class Progress(NamedTuple):
    """How far a piece of work is: of a training or a chain, in steps; of images, in images."""

    done: int
    total: int
    """0 where it is not known."""
    line: dict[str, Any] | None = None
    """Of a training: the newest line of metrics.jsonl, with the speed."""
    what: str = "sampling"
    """The piece of work, where several follow one another."""

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
    """Takes the measurements of a dispatch when it is sent, `collect`s them, `write`s a line, and
    tells how far the training is."""

    def __init__(
        self,
        path: Path,
        settings: Settings,
        num_timesteps: int,
        step: int = 0,
        pending: dict[str, list[Any]] | None = None,
        tell: Callable[[Progress], None] = lambda _: None,
    ) -> None:
        """Resume after `step` steps with what was `pending` then; later lines are dropped."""
        self._path, self._settings, self._num_timesteps = path, settings, num_timesteps
        self.pending = pending or {}
        """By name, numbers or lists of them that are in no line yet; None: not finite."""
        self._coming: list[tuple[range, dict[str, Any]]] = []
        written = step - len(next(iter(self.pending.values()), []))
        self.lines = run_on_writer(lambda: keep_lines(path, written)) or []
        """Those that are in the file already, in the writer."""
        self._tell, self._told, self._line = tell, 0.0, None
        self._step = step
        self._restart()

    def _restart(self) -> None:
        self._timed, self._since = self._step, time.perf_counter()
        self._spent = {"waiting": 0.0, "callbacks": 0.0}

    def add(self, steps: range, metrics: dict[str, Any]) -> None:
        """What the dispatch of these steps will have measured; it is not waited for."""
        self._coming.append((steps, metrics))
        self._step = steps.stop

    @contextmanager
    def spent(self, on: Literal["waiting", "callbacks"]) -> Iterator[None]:
        """Inside, no step is sent: images are waited for, or something else is done."""
        began = time.perf_counter()
        yield
        self._spent[on] += time.perf_counter() - began

    def report(self, now: bool = False) -> None:
        """Tell how many steps are known to be taken, about every second; nothing is waited for."""
        if now or time.monotonic() - self._told >= 1:
            self._told = time.monotonic()
            unknown = (steps for steps, each in self._coming if not each["loss"].is_ready())
            taken = next(unknown, range(self._step, self._step)).start
            self._tell(Progress(taken, self._settings.steps, self._line, "training"))

    def collect(self) -> int | None:
        """Wait for the steps so far. The first whose loss or gradient was not finite, if any."""
        bad = None
        for _, metrics in self._coming:
            jax.block_until_ready(metrics)
            self.report()
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
        self._coming = []
        return bad

    def write(self, figures: Mapping[str, Any]) -> dict[str, Any]:
        """Make a line of what was collected, and of `figures`; steps that were not finite are
        counted apart. Also returns, since they say more of the machine than of the run,
        `images_per_second`, `waiting` (the share of time) and `seconds_left`."""
        kept = {name: [x for x in xs if x is not None] for name, xs in self.pending.items()}
        means = {name: np.mean(xs, axis=0).tolist() if xs else None for name, xs in kept.items()}
        parts, shares = (means[name] or [0] * 4 for name in ("loss_quarters", "share_quarters"))
        quarters = [x / share if share else None for x, share in zip(parts, shares, strict=True)]
        dropped = len(self.pending["loss"]) - len(kept["loss"])
        rate: Any = learning_rate(self._settings)(self._step - 1)
        elapsed = time.perf_counter() - self._since - self._spent["callbacks"]
        speed = (self._step - self._timed) / elapsed
        line = {"step": self._step, **({"dropped": dropped} if dropped else {})}
        line |= {"loss": means["loss"], "grad_norm": means["grad_norm"], "loss_quarters": quarters}
        line |= {"learning_rate": float(rate), "steps_per_second": round(speed, 2), **figures}
        text = (json.dumps(line) + "\n").encode()
        run_on_writer(lambda: write_file(self._path, text, "ab"))
        self._line = {
            **line,
            "images_per_second": round(speed * self._settings.batched(), 1),
            "waiting": round(self._spent["waiting"] / elapsed, 4),
            "seconds_left": round((self._settings.steps - self._step) / max(speed, 1e-9), 1),
        }
        self.pending = {}
        self._restart()
        return self._line


def read_metrics(path: PathLike) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what is damaged, or was left unfinished, is no line."""
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
    replace_file(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
    return lines
