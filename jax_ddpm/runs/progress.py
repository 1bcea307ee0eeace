"""How far something is that takes a while."""

from typing import Any, NamedTuple

__all__ = ["Progress"]


class Progress(NamedTuple):
    """How far a training or a chain is."""

    done: int
    total: int
    line: dict[str, Any] | None = None
    """The line that was just added to metrics.jsonl, with the speed."""
