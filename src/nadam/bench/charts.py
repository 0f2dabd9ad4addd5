"""Inline SVG: bars, and lines over two logarithmic axes. Colours are the page's, by class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10

from nadam.bench.records import BOUNDS, OURS, duration

STOCK, ADAM = (
    ("NAdam", "Nadam", "optax", "NumPy", "NAdam foreach", "NAdam capturable"),
    ("fused Adam", "Adam", "AdamW fused"),
)
WIDTH, HEIGHT = 460, 290
LEFT, RIGHT, TOP, BOTTOM = 68, 16, 12, 46
_POWERS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Points = Sequence[tuple[float, float]]


def style(who: str) -> str:
    """The class of a contestant."""
    classes = {OURS: "is-ours", **dict.fromkeys(STOCK, "is-stock"), **dict.fromkeys(ADAM, "is-adam")}
    return "is-bound" if who in BOUNDS else classes.get(who, "is-other")


def bar(who: str, share: float) -> str:
    """A bar over a share of the width, at least a hair."""
    width = max(0.4, min(100.0, 100 * share))
    return (
        '<svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect class="{style(who)}" width="{width:.2f}" height="10" rx="0.6" ry="2"/></svg>'
    )


def lines(title: str, axis: str, curves: Mapping[str, Points]) -> str:
    """Seconds over sizes, a curve for each contestant."""
    xs, ys = zip(*(point for points in curves.values() for point in points), strict=True)
    left, right = log10(min(xs)), max(log10(max(xs)), log10(min(xs)) + 1)
    low, high = floor(log10(min(ys))), ceil(log10(max(ys)))
    high = max(high, low + 1)

    def across(x: float) -> float:
        return LEFT + (log10(x) - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def down(y: float) -> float:
        return HEIGHT - BOTTOM - (log10(y) - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for power in range(low, high + 1):
        y = down(10.0**power)
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{_time(power)}</text>')
    for power in range(ceil(left), floor(right) + 1):
        x = across(10.0**power)
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
        label = f"10{str(power).translate(_POWERS)}" if power > 3 else f"{10**power:,}"
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{label}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{escape(axis)}</text>')
    for who, points in sorted(curves.items(), key=lambda curve: curve[0] == OURS):  # ours on top
        at = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline class="{style(who)}" points="{at}"/>')
        for x, y in points:
            about = f"<title>{escape(who)}, {x:,}: {duration(y)}</title>"
            parts.append(
                f'<circle class="{style(who)}" cx="{across(x):.1f}" cy="{down(y):.1f}" r="3.2">{about}</circle>'
            )
    return "".join([*parts, "</svg>"])


def _time(power: int) -> str:
    for scale, unit in ((0, "s"), (-3, "ms"), (-6, "µs")):
        if power >= scale:
            return f"{10 ** (power - scale)} {unit}"
    return f"{10 ** (power + 9)} ns"
