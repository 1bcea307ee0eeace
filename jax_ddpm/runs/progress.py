"""How far something is that takes a while."""

from typing import Any, NamedTuple


class Progress(NamedTuple):
    """How far a piece of work is: of a training or a chain, in steps; of images, in images."""

    done: int
    total: int
    line: dict[str, Any] | None = None
    """The line that was just added to metrics.jsonl, with the speed."""
    what: str = "sampling"
    """Of what, where one piece of work follows another."""
