"""Numbers as aligned text: the table on stdout, what is being measured on stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

_START = time.perf_counter()


def duration(seconds: float) -> str:
    """Three digits and a unit.

    Example:
        >>> duration(0.01749), duration(8.1e-6)
        ('17.5 ms', '8.10 us')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{_three_digits(seconds / scale)} {unit}"
    return f"{_three_digits(seconds / 1e-6)} us"


def _three_digits(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


class Table:
    """Rows printed as they come, in columns of fixed width.

    Args:
        columns: Heading and width; a negative width sets the column flush left.
    """

    def __init__(self, columns: Sequence[tuple[str, int]]) -> None:
        self._widths = [width for _, width in columns]
        self.row([heading for heading, _ in columns])

    def row(self, cells: Sequence[str]) -> None:
        """Print one row."""
        progress("")
        padded = [
            cell.ljust(-width) if width < 0 else cell.rjust(width)
            for cell, width in zip(cells, self._widths, strict=True)
        ]
        print("  ".join(padded).rstrip(), flush=True)


def progress(text: str) -> None:
    """Say what is going on, after how many seconds; on a terminal in one line, which the next one replaces."""
    line = f"{time.perf_counter() - _START:5.0f} s  {text}" if text else ""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
    elif line:
        print(line, file=sys.stderr, flush=True)
