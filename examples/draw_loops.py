"""Draw the training loops of docs/performance.md, from its tables: every peer beside ours, and the floor.

python examples/draw_loops.py --out docs/images
"""

import argparse
import json
import re
from pathlib import Path

import matplotlib as mpl
from draw_family import COLOURS, GREY, STYLE
from matplotlib.figure import Figure

TABLES = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
# Of each panel: its title, and its tables: their columns, and the marks that some of these have.
PANELS = {
    "PyTorch: step()": {
        ("model", "kind", "ours", "fused Adam", "torch NAdam", "floor"): {
            "torch NAdam": "stock Nadam",
            "fused Adam": "stock Adam (PyTorch: fused, AdamW in full)",
            "floor": "floor: only moves the bytes",
        },
    },
    "JAX: jitted step less SGD's; Keras: step of fit()": {
        ("model", "kind", "ours", "optax", "`nadam` within optax"): {"optax": "stock Nadam"},
        ("model", "kind", "ours", "keras Nadam", "keras Adam", "SGD"): {
            "keras Nadam": "stock Nadam",
            "keras Adam": "stock Adam (PyTorch: fused, AdamW in full)",
            "SGD": "SGD",
        },
        ("backend", "model", "ours", "keras Nadam", "keras Adam", "SGD"): {
            "keras Nadam": "stock Nadam",
            "keras Adam": "stock Adam (PyTorch: fused, AdamW in full)",
            "SGD": "SGD",
        },
    },
}
MARKS = {
    "stock Nadam": ("o", COLOURS["keras"]),
    "stock Adam (PyTorch: fused, AdamW in full)": ("s", COLOURS["torch"]),
    "floor: only moves the bytes": ("D", GREY),
    "SGD": ("x", GREY),
}
OURS = COLOURS["adam"]


def table(text, columns):
    """Return the rows of the first table of a page that has these columns, as dictionaries."""
    head = f"| {' | '.join(columns)} |\n"
    lines = text[text.index(head) + len(head) :].splitlines()[1:]  # less the line under the head
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append(dict(zip(columns, (cell.strip() for cell in line.strip("|").split("|")), strict=True)))
    return rows


def rows_of(text, columns, marks):
    """Return (label, {mark: time over ours}) for each model and kind of a table."""
    found = []
    for row in table(text, columns):
        models, kinds = row["model"].split("; "), row.get("kind", "plain").split(", ")
        if "optax" in columns:
            prefix = "JAX, "
        elif "SGD" in columns:
            prefix = f"Keras on {row.get('backend', 'torch')}, "
        else:
            prefix = ""
        models = [model.replace(" of 1024", "").replace(", 76 tensors", "") for model in models]
        labels = [f"{prefix}{model}, {kind}" for model in models for kind in kinds]
        ratios = {mark: [float(n) for n in re.findall(r"[\d.]+", row[name])] for name, mark in marks.items()}
        if any(len(of_peer) != len(labels) for of_peer in ratios.values()):
            raise ValueError(f"not one figure for each of {labels}: {row}")
        found += [(label, {mark: of_peer[i] for mark, of_peer in ratios.items()}) for i, label in enumerate(labels)]
    return found


def read(text):
    """Return the rows of each panel by its title."""
    return {
        title: [row for columns, marks in tables.items() for row in rows_of(text, columns, marks)]
        for title, tables in PANELS.items()
    }


def draw(panels):
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    for axes, (title, rows) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        axes.axvline(1, color=OURS, label="ours")
        for mark, (shape, colour) in MARKS.items():
            points = [(ratios[mark], i) for i, (_, ratios) in enumerate(rows) if mark in ratios]
            if points:
                axes.plot(*zip(*points, strict=True), shape, color=colour, markersize=5, label=mark)
        axes.set(title=title, xscale="log", xlim=(0.4, 20), xticks=[0.5, 1, 2, 4, 8, 16], ylim=(len(rows) - 0.4, -0.6))
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.xaxis.set_minor_formatter("")
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.grid(axis="y", color=GREY, alpha=0.25)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("time over ours")
    handles = {}
    for axes in figure.axes:
        found, names = axes.get_legend_handles_labels()
        handles |= dict(zip(names, found, strict=True))
    order = [name for name in ("ours", *MARKS) if name in handles]
    figure.legend([handles[n] for n in order], order, loc="outside upper center", ncols=len(order), frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the picture (default: this one)")
    path = parser.parse_args().out / "loops.svg"
    panels = read(TABLES.read_text())
    with mpl.rc_context(STYLE | {"font.size": 8}):
        # The figures are in the file, so that a test sees whether it was drawn from today's tables.
        about = {"Date": None, "Description": json.dumps(panels)}
        draw(panels).savefig(path, transparent=True, metadata=about)
    print(path)


if __name__ == "__main__":
    main()
