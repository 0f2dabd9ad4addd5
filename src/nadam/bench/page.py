"""A run as one HTML page that asks for nothing else: no scripts, no files, no requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from nadam.bench import charts
from nadam.bench.machine import busy_at
from nadam.bench.records import OURS, PARTS, Change, Growth, Kept, Run, Target, Timing, duration

LEGEND = {
    "is-ours": "nadam",
    "is-stock": "stock Nadam",
    "is-adam": "stock Adam",
    "is-bound": "floor, or SGD: no optimizer to speak of",
    "is-other": "others",
}


def render(run: Run, changes: Sequence[Change] = ()) -> str:
    """The text of the page."""
    template = Template(files("nadam.bench").joinpath("page.html").read_text("utf-8"))
    sections = [section(part, run.rows[part]) for part in PARTS if run.rows[part]]
    if changes:
        sections.append(f"<h2>Compared with another run</h2>{compared(changes)}")
    how = "a first look" if run.options.get("quick") else f"{run.options.get('rounds')} rounds"
    return template.substitute(
        summary=f"nadam {escape(run.versions.get('nadam', '?'))} on {escape(run.machine.get('processor', '?'))}: "
        f"{how}, {run.seconds:.0f} s",
        warnings="".join(warnings(run)),
        legend="".join(f'<span class="key"><i class="{key}"></i>{text}</span>' for key, text in LEGEND.items()),
        machine=pairs(run.machine),
        versions=pairs(run.versions),
        sections="\n".join(sections),
    )


def warnings(run: Run) -> Iterator[str]:
    """What makes the figures doubtful."""
    if busy_at(run.machine):
        load = escape(run.machine["load at the start"])
        yield f'<div class="card warning">Other programs computed on this machine (load {load}): figures are worse '
        yield "than it can do, and ratios can be far off, above all of what waits for several threads at once.</div>"
    for name, reason in run.failed.items():
        yield f'<div class="card warning"><h3>{escape(name)} ended early</h3><pre>{escape(reason)}</pre></div>'


def pairs(values: Mapping[str, str]) -> str:
    """Names and values."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in values.items())


def section(part: str, rows: Sequence[Any]) -> str:
    """A part under its heading."""
    title, kind = PARTS[part]
    cards: Callable[[Any], Iterator[str]] = bars if part in ("loops", "gpu") else _CARDS[kind]
    return f'<h2>{escape(title)}</h2><div class="grid">{"".join(cards(rows))}</div>'


def bars(rows: Sequence[Timing]) -> Iterator[str]:
    """A card for each host, a group of bars for each model and kind."""
    for host in dict.fromkeys(row.host for row in rows):
        parts = [f'<div class="card"><h3>{escape(host)}</h3><div class="bars">']
        for model, kind in dict.fromkeys((row.model, row.kind) for row in rows if row.host == host):
            group = [row for row in rows if row.key[:3] == (host, model, kind)]
            # Differences of two times may be below 0.
            longest = max(1e-12, *(seconds for row in group for seconds in (row.ours, row.theirs)))
            parts.append(f'<div class="group">{escape(model)}, {escape(kind)}</div>')
            parts.append(_bar(OURS, group[0].ours / longest, duration(group[0].ours), ""))
            parts += [
                _bar(row.against, row.theirs / longest, duration(row.theirs), _ratio(row.ratio, row.verdict, row.note))
                for row in group
            ]
        yield "".join([*parts, "</div></div>"])


def _bar(who: str, share: float, time: str, ratio: str) -> str:
    name = "nadam" if who == OURS else escape(who)
    cells = f'<span class="number">{time}</span><span class="number">{ratio}</span>'
    return f'<span class="who">{name}</span>{charts.bar(who, share)}{cells}'


def _ratio(ratio: float, verdict: str, note: str = "") -> str:
    return f'<span class="{verdict}" title="{escape(note)}">{ratio:.2f}x</span>'


def growth(rows: Sequence[Growth]) -> Iterator[str]:
    """A chart for each host and axis."""
    titles = {"parameters": "one tensor of so many parameters", "tensors": "so many tensors of 1,000 parameters"}
    for host, axis in dict.fromkeys((row.host, row.axis) for row in rows):
        curves: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if (row.host, row.axis) == (host, axis):
                curves.setdefault(row.who, []).append((row.size, row.seconds))
        title = f"{host}: a step of {titles[axis]}"
        names = "".join(
            f'<span class="key"><i class="{charts.style(who)}"></i>{"nadam" if who == OURS else escape(who)}</span>'
            for who in curves
        )
        chart = charts.lines(title, axis, curves)
        yield f'<div class="card"><h3>{escape(title)}</h3>{chart}<p>{names}</p></div>'


def kept(rows: Sequence[Kept]) -> Iterator[str]:
    """A table for each host, a column for each number format."""
    for host in dict.fromkeys(row.host for row in rows):
        own = [row for row in rows if row.host == host]
        dtypes = list(dict.fromkeys(row.dtype for row in own))
        found = {(row.who, row.kind, row.dtype): f"{row.bytes:g}" for row in own}
        cells = [
            ["nadam" if who == OURS else who, kind, *(found.get((who, kind, dtype), "") for dtype in dtypes)]
            for who, kind in dict.fromkeys((row.who, row.kind) for row in own)
        ]
        yield card(host, table(["whose", "kind", *dtypes], cells, 2))


def timings(rows: Sequence[Timing]) -> Iterator[str]:
    """A table for each host."""
    for host in dict.fromkeys(row.host for row in rows):
        cells = [
            [*row.key[1:], duration(row.ours), duration(row.theirs), (f"{row.ratio:.2f}x", row.verdict)]
            for row in rows
            if row.host == host
        ]
        yield card(host, table(["case", "kind", "against", "ours", "theirs", "ratio"], cells, 3))


def targets(rows: Sequence[Target]) -> Iterator[str]:
    """One table."""
    cells = [[row.what, row.wanted, row.seen, "yes" if row.reached else "no"] for row in rows]
    yield card("", table(["what", "wanted", "seen", "reached"], cells, 1))


def compared(changes: Sequence[Change]) -> str:
    """Ratios of both runs."""
    cells = [[*each.row.key, f"{each.before:.2f}x", f"{each.row.ratio:.2f}x", f"{each.factor:.2f}"] for each in changes]
    return card("", table(["host", "model", "kind", "against", "then", "now", "now / then"], cells, 4))


def card(title: str, content: str) -> str:
    """A box with a heading, if it has one."""
    heading = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card">{heading}<div class="scroll">{content}</div></div>'


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], texts: int) -> str:
    """A table whose first columns are texts, the others numbers; a cell may have a class."""

    def cell(tag: str, i: int, value: str | tuple[str, str]) -> str:
        text, kind = (value, "") if isinstance(value, str) else value
        return f'<{tag} class="{"number " * (i >= texts)}{kind}">{escape(text)}</{tag}>'

    lines = [("th", head), *(("td", row) for row in rows)]
    return f"<table>{''.join(_line(tag, row, cell) for tag, row in lines)}</table>"


def _line(tag: str, row: Sequence[Any], cell: Any) -> str:
    return f"<tr>{''.join(cell(tag, i, value) for i, value in enumerate(row))}</tr>"


_CARDS: dict[type[Any], Callable[[Any], Iterator[str]]] = {
    Timing: timings,
    Growth: growth,
    Kept: kept,
    Target: targets,
}
