"""Tables on the terminal."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> str:
    """Aligns cells in columns.

    Args:
        rows: Cells; the first row is the header, which a rule separates from the others.
        left: Columns with text, aligned left; the others hold numbers and are aligned right.

    Returns:
        Lines without trailing spaces.
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]

    def line(cells: Sequence[str]) -> str:
        return "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(rows[0]), rule, *map(line, rows[1:])])
