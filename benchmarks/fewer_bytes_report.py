"""The tables and the picture of docs/fewer-bytes.md, from the record of `benchmarks.fewer_bytes`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from benchmarks.convergence_report import GREY, PURPLE, STYLE, fingerprint
from examples.draw_family import COLOURS
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import t as student

TITLES = {"text": "Transformer on text", "conv": "Convolutional net on digits"}
OURS, THEIRS, WIDE = "float32", "AdamW", "bfloat16 + 16"
IN_ONE_PASS = {THEIRS}  # of those that are not ours: they read and write each byte once in a step
PICTURE = "fewer_bytes.svg"


def is_ours(name: str) -> bool:
    return not name.startswith(THEIRS)


def ends(runs: dict[str, Any], name: str) -> NDArray[np.float64]:
    """The held-out loss at the end, for each seed; where it was not finite, infinity."""
    return np.nan_to_num(np.array([losses[-1] for losses in runs[name]["held_out"]], np.float64), nan=np.inf)


def over(runs: dict[str, Any], name: str, reference: str) -> NDArray[np.float64]:
    """The loss at the end over another's of the same seed, in percent."""
    return np.asarray(100 * (ends(runs, name) / ends(runs, reference) - 1))


def reference_of(name: str) -> str:
    """The float32 optimizer of the same rule."""
    return OURS if is_ours(name) else THEIRS


def is_within(runs: dict[str, Any], name: str) -> bool:
    """Whether the mean loss is at most the largest of the float32 seeds, and at least the least."""
    wide = ends(runs, reference_of(name))
    return bool(wide.min() <= ends(runs, name).mean() <= wide.max())


def percent(values: NDArray[np.float64]) -> str:
    """The mean, and half of a 95 % interval of it."""
    half = student.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return f"{values.mean():+.2f} ± {half:.2f}"


def table(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def losses(part: dict[str, Any]) -> str:
    runs = part["runs"]
    rows = [["", "loss at the end", "over float32's, %", "over bfloat16 + 16's, %", "within"]]
    for name in runs:
        found, reference = ends(runs, name), reference_of(name)
        row = [name, f"{found.mean():.4f} ({found.min():.4f} to {found.max():.4f})"]
        row.append("" if name == reference else percent(over(runs, name, reference)))
        half = is_ours(name) and name.startswith(f"{WIDE[:8]}") and name != WIDE
        row.append(percent(over(runs, name, WIDE)) if half else "")
        row.append("" if name == reference else "yes" if is_within(runs, name) else "no")
        rows.append(row)
    return table(rows)


def section(key: str, part: dict[str, Any]) -> str:
    """The Markdown of one task: what was trained, and the table."""
    steps = f"{part['steps']} steps of {part['batch']} at a learning rate of {part['rate']:g}"
    share = f"{100 * part['large'] / part['parameters']:.1f} % of them in tensors of at least 4,096"
    return f"### {TITLES[key]}\n\n{part['parameters']:,} parameters, {share}; {steps}.\n\n{losses(part)}\n"


def kept(parts: dict[str, Any]) -> str:
    """The table of bytes for each parameter: counted, and measured with the gradient's."""
    sums = ["together", "moved", "and gradient", "measured", "peak, MB"]
    rows = [["", "parameter", "remainder", "moments", "scales", *sums]]
    for name, found in parts["bytes"].items():
        together, run = sum(found.values()), parts["memory"][name]
        measured = (run["peak"] - run["before"]) * 1e6 / run["parameters"]
        one_pass = is_ours(name) or name in IN_ONE_PASS
        moved = f"{2 * together + found['parameter']:.2f}" if one_pass else ""
        numbers = [f"{number:.3g}" if number else "" for number in found.values()]
        alive = f"{together + found['parameter']:.2f}"
        rows.append([name, *numbers, f"{together:.2f}", moved, alive, f"{measured:.1f}", f"{run['peak']:,}"])
    return table(rows)


def draw_gaps(axes: Axes, runs: dict[str, Any], names: list[str]) -> None:
    """For each seed, the loss at the end over float32's of the same seed; behind, how far float32's seeds lie apart."""
    for of_ours, colour in ((True, COLOURS["optax"]), (False, PURPLE)):
        rows = [i for i, name in enumerate(names) if is_ours(name) == of_ours]
        if not rows:
            continue
        wide = ends(runs, reference_of(names[rows[0]]))
        band = 100 * (np.array([wide.min(), wide.max()]) / wide.mean() - 1)
        axes.fill_betweenx([rows[0] - 0.5, rows[-1] + 0.5], *band, color=colour, alpha=0.12, linewidth=0)
        for row in rows:
            found = over(runs, names[row], reference_of(names[row]))
            axes.plot(found, np.full(len(found), row), "o", color=colour, markersize=4, alpha=0.5, markeredgewidth=0)
            axes.plot(found.mean(), row, "|", color=colour, markersize=12, markeredgewidth=2)
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set(xlabel="held-out loss over float32's of the same seed, %", ylim=(len(names) - 0.5, -0.5))
    axes.grid(axis="x", color=GREY, alpha=0.2)
    axes.tick_params(axis="y", length=0)


def draw(parts: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(TITLES)), TITLES, strict=True):
        runs = parts[key]["runs"]
        names = [name for name in runs if name != reference_of(name)]
        draw_gaps(axes, runs, names)
        axes.set_yticks(range(len(names)), names if key == "text" else [""] * len(names))
        axes.set_title(TITLES[key])
    return figure


def report(record: dict[str, Any], folder: Path) -> None:
    """Draw the picture into a folder and print the tables."""
    parts = record["parts"]
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE | {"font.size": 8}):
        path = folder / PICTURE
        draw(parts).savefig(path, transparent=True, metadata={"Date": None, "Description": fingerprint(record)})
    print(path)
    print(f"\n{kept(parts)}\n")
    for key in TITLES:
        print(f"\n{section(key, parts[key])}", end="")
