"""Text of the commands: tables of figures, and plurals."""

from collections.abc import Sequence


def table(align: str, rows: Sequence[Sequence[str]]) -> str:
    """Lines of aligned cells. `align` has `<`, `>` or `^` for each column; a row of a single cell
    is a heading, and takes no part in the widths."""
    full = [row for row in rows if len(row) == len(align)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]

    def line(row: Sequence[str]) -> str:
        if len(row) < len(align):
            return " ".join(row)
        cells = zip(row, align, widths, strict=True)
        return "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

    return "\n".join(map(line, rows))


def counted(number: int, noun: str) -> str:
    """`1 image`, `1,000 images`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
