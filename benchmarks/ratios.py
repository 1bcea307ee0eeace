"""What the records come to: how many times as long the other side takes.

A ratio is taken round by round, since the contenders of a round ran within the same moments; its
median and its lowest and highest round are what a later run is compared with.
"""

import statistics
from typing import Any, NamedTuple

from benchmarks.contenders import JAX_PLAIN, JAX_SHARDED

__all__ = ["Ratio", "moved", "ratios"]

_TIMED = {
    "sampling": "tutorial reverse loop, 64×64",
    "training": "tutorial training step",
    "cifar10_sampling": "`ddpm_cifar10` reverse loop",
    "cifar10_training": "`ddpm_cifar10` training step",
}


_BETWEEN_RUNS = 1.03
"""How far a median may leave the other run's rounds: those of one process share where its memory
lies. Between two runs of the same code the largest distances seen were 0.6 % of a time and 2.5 %
of a peak of memory."""


class Ratio(NamedTuple):
    """Above 1, ours is the better."""

    work: str
    batch: int
    ours: str
    theirs: str
    rounds: list[float]

    @property
    def middle(self) -> float:
        """The median of the rounds."""
        return statistics.median(self.rounds)


def ratios(results: dict[str, Any]) -> list[Ratio]:
    """Every ratio that `results` holds: the fastest of ours to the fastest of theirs."""
    found = []
    for section, work in _TIMED.items():
        rows = results.get(section, [])
        for batch in sorted({row["batch"] for row in rows}):
            here = {r["contender"]: r["seconds_per_step"] for r in rows if r["batch"] == batch}
            ours = _fastest({n: t for n, t in here.items() if n in (JAX_PLAIN, JAX_SHARDED)})
            theirs = _fastest({n: t for n, t in here.items() if n not in (JAX_PLAIN, JAX_SHARDED)})
            rounds = [b / a for a, b in zip(here[ours], here[theirs], strict=True)]
            found.append(Ratio(work, batch, ours, theirs, rounds))
    if overhead := results.get("overhead"):
        times = {row["contender"]: row["seconds_per_step"] for row in overhead}
        names = zip(("", ", DDIM"), list(times)[:2], list(times)[2:], strict=True)
        for kind, ours, theirs in names:
            rounds = [b / a for a, b in zip(times[ours], times[theirs], strict=True)]
            found.append(Ratio(f"a step beyond the network{kind}", 1, ours, theirs, rounds))
    if peak := results.get("peak"):
        (_, best), (ours, share) = ((row["contender"], row["gflop_per_second"]) for row in peak)
        rounds = [b / a for a, b in zip(best, share, strict=True)]
        found.append(Ratio("share of the sgemm peak", 16, ours, "sgemm", rounds))
    if checkpoints := results.get("checkpoints"):
        without, with_ = (row["seconds"] for row in checkpoints)
        work = f"training with a checkpoint every {checkpoints[0]['steps']} steps"
        rounds = [a / b for a, b in zip(without, with_, strict=True)]
        found.append(Ratio(work, checkpoints[0]["batch"], "with", "without", rounds))
    if processes := results.get("processes"):
        for row in processes:
            if row["what"] == "attention" and row["side"] == "jax":
                work = f"memory of attention over 64×64 tokens, {row['pass']}"
                other = next(
                    r
                    for r in processes
                    if r["what"] == "attention"
                    and r["side"] == "torch"
                    and r["pass"] == row["pass"]
                )
                rounds = [b / a for a in row["bytes"] for b in other["bytes"]]
                found.append(Ratio(work, 1, row["contender"], other["contender"], rounds))
        memory = {row["contender"]: row["bytes"] for row in processes if row["what"] == "memory"}
        ours = memory.pop(JAX_SHARDED)
        theirs = _fastest(memory)
        # Processes do not take turns: every pair of them is a round.
        rounds = [b / a for a in ours for b in memory[theirs]]
        found.append(Ratio("peak memory of sampling", 16, JAX_SHARDED, theirs, rounds))
    return found


def moved(recorded: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    """A line for each ratio whose median left the range of the other's rounds, both ways.

    Raises `ValueError` if the two have no ratio in common.
    """
    before = {(r.work, r.batch): r for r in ratios(recorded)}
    pairs = [(before[r.work, r.batch], r) for r in ratios(measured) if (r.work, r.batch) in before]
    if not pairs:
        raise ValueError("recorded: expected ratios of the same work, got none")
    return [
        f"{then.work}, batch {then.batch}: {then.middle:.2f} × ({_spread(then)}) then, "
        f"{now.middle:.2f} × ({_spread(now)}) now"
        for then, now in pairs
        if not _inside(now.middle, then.rounds) and not _inside(then.middle, now.rounds)
    ]


def _fastest(times: dict[str, list[float]]) -> str:
    return min(times, key=lambda name: statistics.median(times[name]))


def _inside(value: float, rounds: list[float]) -> bool:
    return min(rounds) / _BETWEEN_RUNS <= value <= max(rounds) * _BETWEEN_RUNS


def _spread(ratio: Ratio) -> str:
    return f"{min(ratio.rounds):.2f} – {max(ratio.rounds):.2f}"
