"""A run as tables in a terminal, by rich."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nadam.bench.records import OURS, PARTS, Change, Growth, Kept, Run, Target, Timing, duration

COLOURS = {"ahead": "green", "level": "yellow", "behind": "red", "bound": "default"}
REACHED = {True: "yes", False: "no", None: ""}


def show(console: Console, run: Run, changes: Sequence[Change]) -> None:
    """Print every part that has rows, and what ended early."""
    console.print(Text(", ".join(f"{name} {version}" for name, version in run.versions.items())))
    console.print(Text(", ".join(f"{name}: {value}" for name, value in run.machine.items()), style="dim"))
    for part, (title, kind) in PARTS.items():
        rows = run.rows[part]
        if rows:
            console.print(*_TABLES[kind](title, rows))
    if changes:
        console.print(compared(changes))
    for name, reason in run.failed.items():
        console.print(Text(f"{name} ended early:\n{reason}", style="red"))


def new_table(title: str, names: Sequence[str], numbers: Sequence[str]) -> Table:
    """A table with columns of text, then of numbers."""
    table = Table(title=f"\n{title}", title_justify="left", title_style="bold", header_style="dim", box=box.SIMPLE_HEAD)
    table.pad_edge = False
    for name in names:
        table.add_column(name, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def timings(title: str, rows: Sequence[Timing]) -> Iterator[Table]:
    """A table for each host; the ratio is the figure."""
    for host in dict.fromkeys(row.host for row in rows):
        own = [row for row in rows if row.host == host]
        wanted, notes = any(row.wanted for row in own), any(row.note for row in own)
        numbers = ["ours", "theirs", "ratio", *["wanted"] * wanted, *["seen"] * notes]
        table = new_table(f"{title}: {host}", ["model", "kind", "against"], numbers)
        before: tuple[str, ...] = ()
        for row in own:
            same = row.key[:3] == before
            table.add_row(
                *([""] * 2 if same else row.key[1:3]),
                row.against,
                duration(row.ours),
                duration(row.theirs),
                Text(f"{row.ratio:.2f}x", style=COLOURS[row.verdict]),
                *([f"{row.wanted:.2f}x {REACHED[row.reached]}" if row.wanted else ""] if wanted else []),
                *([row.note] if notes else []),
            )
            before = row.key[:3]
        yield table


def growth(title: str, rows: Sequence[Growth]) -> Iterator[Table]:
    """A table for each host and axis, a column for each contestant."""
    for host, axis in dict.fromkeys((row.host, row.axis) for row in rows):
        own = [row for row in rows if (row.host, row.axis) == (host, axis)]
        names = list(dict.fromkeys(row.who for row in own))
        table = new_table(f"{title}: {host}, {axis}", [axis], names)
        for size in dict.fromkeys(row.size for row in own):
            seconds = {row.who: row.seconds for row in own if row.size == size}
            table.add_row(f"{size:,}", *(duration(seconds[who]) if who in seconds else "" for who in names))
        yield table


def kept(title: str, rows: Sequence[Kept]) -> Iterator[Table]:
    """Bytes by number format."""
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    table = new_table(title, ["host", "whose", "kind"], dtypes)
    for host, who, kind in dict.fromkeys((row.host, row.who, row.kind) for row in rows):
        found = {row.dtype: row.bytes for row in rows if (row.host, row.who, row.kind) == (host, who, kind)}
        cells = [f"{found[dtype]:g}" if dtype in found else "" for dtype in dtypes]
        table.add_row(host, who, kind, *cells, style="bold" if who == OURS else "")
    yield table


def targets(title: str, rows: Sequence[Target]) -> Iterator[Table]:
    """What was wanted and what was seen."""
    table = new_table(title, ["what"], ["wanted", "seen", "reached"])
    for row in rows:
        table.add_row(row.what, row.wanted, row.seen, REACHED[row.reached])
    yield table


def compared(changes: Sequence[Change]) -> Table:
    """Ratios of two runs."""
    table = new_table("Compared", ["host", "model", "kind", "against"], ["then", "now", "now / then"])
    for part, row, before in changes:
        factor = Change(part, row, before).factor
        style = "default" if 0.9 < factor < 1.1 else "green" if factor > 1 else "red"
        table.add_row(*row.key, f"{before:.2f}x", f"{row.ratio:.2f}x", Text(f"{factor:.2f}", style=style))
    return table


_TABLES: dict[type[Any], Callable[[str, Any], Iterator[Table]]] = {
    Timing: timings,
    Growth: growth,
    Kept: kept,
    Target: targets,
}
