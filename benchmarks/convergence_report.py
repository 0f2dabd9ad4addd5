"""The tables and pictures of docs/convergence.md, from the record of `benchmarks.convergence`."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from examples import quadratic_deep
from examples.draw_family import COLOURS, GREY, STYLE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import t as student

ROOT = Path(__file__).resolve().parent.parent
FAMILY = {
    "keras": "Nadam, Keras's",
    "torch": "Nadam, PyTorch's",
    "optax": "Nadam, optax's",
    "adam": "Nadam, the fourth",
}
PURPLE, DASHES = "#9b5de5", (3, 2)
LINES: dict[str, dict[str, Any]] = {
    **{name: {"color": COLOURS[member]} for member, name in FAMILY.items()},
    "NadamW": {"color": COLOURS["adam"], "dashes": DASHES},
    "Adam": {"color": PURPLE},
    "AdamW": {"color": PURPLE, "dashes": DASHES},
    "SGD": {"color": GREY},
}
TITLES = {
    "mlp": "MLP on digits",
    "conv": "Convolutional net on digits",
    "text": "Transformer on text",
    "text-warmup": "Transformer with warm-up",
}
STOCK = "torch.optim.NAdam"
SGD_OVER_RATES = 10  # SGD's learning rates are so many times as large
NEAR = 1.05

Runs = dict[str, dict[str, list[Any]]]
Array = NDArray[np.float64]


def of(runs: Runs, rate: str, what: str = "held_out") -> Array:
    """One quantity at one rate, a row for each seed; where it was not finite, infinity."""
    return np.nan_to_num(np.array(runs[rate][what], np.float64), nan=np.inf)


def ends(runs: Runs) -> dict[str, float]:
    """The held-out loss at the end, mean over seeds, at each rate."""
    return {rate: float(of(runs, rate)[:, -1].mean()) for rate in runs}


def best(runs: Runs) -> str:
    """The rate at which it is least."""
    means = ends(runs)
    return min(means, key=means.__getitem__)


def over_adam(part: dict[str, Any], name: str) -> tuple[float, float]:
    """Loss at the end over Adam's, both at their best rate, in percent: mean over seeds, half of a 95 % interval."""
    own, adam = (of(part["runs"][one], best(part["runs"][one]))[:, -1] for one in (name, "Adam"))
    percent = 100 * (own / adam - 1)
    half = student.ppf(0.975, len(percent) - 1) * percent.std(ddof=1) / np.sqrt(len(percent))
    return float(percent.mean()), float(half)


def section(key: str, part: dict[str, Any]) -> str:
    """The Markdown of one part: what was trained, and the table."""
    (train, held_out), steps = part["rows"], part["steps"][-1]
    rows = f"{steps} steps of {part['batch']} out of {train:,}; {held_out:,} held out"
    return f"### {TITLES[key]}\n\n{part['parameters']:,} parameters, {rows}.\n\n{table(part)}\n"


def table(part: dict[str, Any]) -> str:
    first = part["steps"][3]
    head = [
        "",
        "rate",
        f"loss at step {first}",
        "loss at the end",
        "over Adam's, %",
        "accuracy, %",
        "training loss",
        "rates",
        "ms",
    ]
    rows = [head, ["---"] * len(head)]
    for name, runs in part["runs"].items():
        rate, means = best(runs), ends(runs)
        losses = of(runs, rate)
        near = sum(mean <= NEAR * means[rate] for mean in means.values())
        mean, half = over_adam(part, name)
        rows.append(
            [
                name,
                rate,
                f"{losses[:, 3].mean():.3f}",
                f"{means[rate]:.3f} ({losses[:, -1].min():.3f} to {losses[:, -1].max():.3f})",
                "" if name == "Adam" else f"{mean:+.1f} ± {half:.1f}",
                f"{100 * of(runs, rate, 'accuracy').mean():.1f}",
                f"{of(runs, rate, 'train').mean():.3f}",
                f"{near} of {len(runs)}",
                f"{part['ms'][name]:.2f}",
            ]
        )
    rows.append([STOCK, *[""] * (len(head) - 2), f"{part['ms'][STOCK]:.2f}"])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def parts_of(record: dict[str, Any]) -> dict[str, Any]:
    """The parts that trained, each with the times of its steps."""
    parts = record["parts"]
    return {key: parts[key] | {"ms": parts["times"][key]} for key in TITLES}


def draw_band(axes: Axes, x: Any, losses: Array, line: dict[str, Any], label: str) -> None:
    """The mean of the rows as a line, and from the least to the largest as a band."""
    finite = np.isfinite(losses).all(axis=0)
    x, losses = np.asarray(x)[finite], losses[:, finite]
    axes.plot(x, losses.mean(axis=0), label=label, **line)
    axes.fill_between(x, losses.min(axis=0), losses.max(axis=0), color=line["color"], alpha=0.15, linewidth=0)


def plain_numbers(axes: Axes, *ticks: float) -> None:
    """The y axis logarithmic, with these numbers written out at it."""
    axes.set_yscale("log")
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.yaxis.set_minor_formatter("")


def ticks_within(low: float, high: float) -> list[float]:
    return [tick for tick in (0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1, 1.5, 2, 2.5, 3, 4) if low <= tick <= high]


def draw_curves(parts: dict[str, Any]) -> Figure:
    """Held-out loss over steps and over seconds, each optimizer at its best rate."""
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    for column, part in zip(figure.subplots(2, len(parts), sharey="col").T, parts.values(), strict=True):
        steps = np.array(part["steps"])
        for name, line in LINES.items():
            losses = of(part["runs"][name], best(part["runs"][name]))
            draw_band(column[0], steps[1:], losses[:, 1:], line, name)
            draw_band(column[1], steps[1:] * part["ms"][name] / 1e3, losses[:, 1:], line, name)
    for axes, part in zip(figure.axes, parts, strict=False):
        axes.set_title(TITLES[part])
    finish(figure, len(parts), "held-out loss", ["step", "seconds"])
    return figure


def finish(figure: Figure, columns: int, ylabel: str, xlabels: list[str]) -> None:
    """Scales, labels and one legend above."""
    for i, axes in enumerate(figure.axes):
        axes.set(xscale="log", xlabel=xlabels[i // columns])
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(axis="y", color=GREY, alpha=0.2)
        plain_numbers(axes, *ticks_within(*axes.get_ylim()))
    for axes in figure.axes[::columns]:
        axes.set_ylabel(ylabel)
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)


def draw_rates(parts: dict[str, Any]) -> Figure:
    """The loss at the end over the learning rate; and over Adam's, each at its best rate."""
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    upper, lower = figure.subplots(2, len(parts))
    for axes, (key, part) in zip(upper, parts.items(), strict=True):
        least = min(min(ends(runs).values()) for runs in part["runs"].values())
        for name, line in LINES.items():
            runs = part["runs"][name]
            rates = np.array(list(map(float, runs))) / (SGD_OVER_RATES if name == "SGD" else 1)
            draw_band(axes, rates, np.stack([of(runs, rate)[:, -1] for rate in runs], axis=1), line, name)
        axes.set(
            title=TITLES[key],
            xscale="log",
            xlabel=f"learning rate (SGD: {SGD_OVER_RATES} times)",
            ylim=(0.97 * least, 1.9 * least),
        )
        axes.xaxis.set_major_formatter("{x:g}")
        plain_numbers(axes, *ticks_within(*axes.get_ylim()))
        axes.grid(axis="y", color=GREY, alpha=0.2)
    for axes, part in zip(lower, parts.values(), strict=True):
        names = [name for name in LINES if name != "Adam"]
        axes.axvline(0, color=PURPLE)
        for i, name in enumerate(names):
            mean, half = over_adam(part, name)
            filled = "none" if "dashes" in LINES[name] else None
            axes.errorbar(mean, i, xerr=half, fmt="o", color=LINES[name]["color"], markersize=5, mfc=filled, capsize=2)
        axes.set_yticks(range(len(names)), names if axes is lower[0] else [""] * len(names))
        axes.set(xlabel="loss over Adam's, %", ylim=(len(names) - 0.5, -0.5))
        axes.grid(axis="x", color=GREY, alpha=0.2)
        axes.tick_params(axis="y", length=0)
    upper[0].set_ylabel("held-out loss at the end")
    handles, names = upper[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def draw_published(part: dict[str, Any]) -> Figure:
    """The four members on DeepOBS's quadratic_deep, and what was published."""
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    whole, apart = figure.subplots(1, 2)
    epochs, fourth = part["epochs"], np.array(part["adam"])
    for member, name in FAMILY.items():
        losses = np.array(part[member])
        draw_band(whole, epochs, losses, LINES[name], name)
        draw_band(apart, epochs[1:], (losses - fourth.mean(axis=0))[:, 1:], LINES[name], name)
    points = {epoch: loss for epoch, loss in quadratic_deep.PUBLISHED.items() if epoch in epochs}
    mean = dict(zip(epochs, fourth.mean(axis=0), strict=True))
    marks = {"color": GREY, "marker": "D", "linestyle": "none", "label": "published", "zorder": 3}
    whole.plot(list(points), list(points.values()), **marks)
    apart.plot([e for e in points if e], [loss - mean[e] for e, loss in points.items() if e], **marks)
    whole.set(title="test loss", xlabel="epoch")
    apart.set(title="less the fourth's", xlabel="epoch", xscale="log")
    apart.xaxis.set_major_formatter("{x:g}")
    handles, names = whole.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def fingerprint(record: dict[str, Any]) -> str:
    """What a picture says of the record that it was drawn from."""
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def report(record: dict[str, Any], folder: Path) -> None:
    """Draw the pictures into a folder and print the tables."""
    parts = parts_of(record)
    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE | {"font.size": 8, "lines.linewidth": 1.3}):
        for name, figure in {
            "curves": draw_curves(parts),
            "rates": draw_rates(parts),
            "published": draw_published(record["parts"]["published"]),
        }.items():
            path = folder / f"convergence-{name}.svg"
            figure.savefig(path, transparent=True, metadata={"Date": None, "Description": fingerprint(record)})
            print(path)
    for key, part in parts.items():
        print(f"\n{section(key, part)}", end="")
