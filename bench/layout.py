"""Tables of text: columns as wide as their widest cell."""

from collections.abc import Sequence


def lay_out(rows: Sequence[tuple[str, ...]]) -> str:
    """The rows, one a line, cells to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
