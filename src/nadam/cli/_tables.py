"""Tables in a terminal: by rich where it is installed, else in plain columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that have the same columns."""
    columns = list(rows[0])
    cells = [[str(row[column]) for column in columns] for row in rows]
    with suppress(ImportError):
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*columns, box=box.SIMPLE_HEAD, header_style="dim")
        for row in cells:
            table.add_row(*row)
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    for row in [columns, *cells]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
