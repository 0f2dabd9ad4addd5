"""Draw the two pictures of docs/which.md: what the four members of the Nadam family differ in, and where it takes them.

python examples/draw_family.py --out docs/images
"""

import argparse
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from nadam.conformance import load

BETA1 = 0.9
PSI = {"keras": 1.0, "torch": 0.004, "optax": np.inf, "adam": np.inf}
LABELS = {"keras": "Keras", "torch": "PyTorch", "optax": "optax", "adam": "AlgoPerf, timm, TensorFlow 1"}
# Dark enough on white, light enough on black.
COLOURS = {"keras": "#d1495b", "torch": "#e08e0b", "optax": "#2a9d5c", "adam": "#3f88c5"}
GREY = "#808080"
STYLE = {
    "svg.fonttype": "none",  # text stays text, and the files small
    "svg.hashsalt": "nadam",  # the same names inside at every run
    "font.size": 9,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "lines.linewidth": 1.6,
}


def momentum(member, steps):
    return BETA1 * (1 - 0.5 * 0.96 ** (steps * PSI[member]))


def weights(member, steps):
    """Return the weights of exp_avg and grad in m_hat, for steps from 1 on without a gap."""
    now, following = momentum(member, steps), momentum(member, steps + 1)
    product = np.cumprod(now)
    ahead = 1 - product if member == "adam" else 1 - product * following
    return following / ahead, (1 - now) / (1 - product)


def draw_schedules(axes):
    steps = np.geomspace(1, 1e5, 200)
    for member in PSI:
        dashes = {"dashes": (3, 3)} if member == "adam" else {}  # over optax's line, which it shares
        axes[0].plot(steps, momentum(member, steps), color=COLOURS[member], **dashes)
    axes[0].set(title="momentum", xlabel="step", xscale="log", ylim=(0.4, 0.95))
    steps = np.arange(1, 101)
    for member in PSI:
        of_average, of_grad = weights(member, steps)
        length = of_average * (1 - BETA1**steps) + of_grad  # where all gradients are alike
        axes[1].plot(steps, length, color=COLOURS[member])
    axes[1].set(title="step under a constant gradient, in lr", xlabel="step", xscale="log")
    for axis in axes:
        axis.xaxis.set_major_formatter("{x:,.0f}")


def draw_trajectories(axes):
    data = load()
    case = data["cases"][0]
    for i, axis in enumerate(axes):
        for member in PSI:
            axis.plot(np.array([data["param"], *case[member]])[:, i], color=COLOURS[member])
        axis.set(title=f"param[{i}], gradients around {0.25 * i:g}", xlabel="step")


def draw(panels):
    figure = Figure(figsize=(8, 3.1), layout="constrained")
    axes = figure.subplots(1, 2)
    panels(axes)
    names = [LABELS[member] for member in PSI]
    figure.legend(axes[1].lines, names, loc="outside upper center", ncols=len(names), frameon=False)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(), help="folder of the pictures (default: this one)")
    folder = parser.parse_args().out
    with mpl.rc_context(STYLE):
        for name, panels in {"family-momentum": draw_schedules, "family-trajectories": draw_trajectories}.items():
            draw(panels).savefig(folder / f"{name}.svg", transparent=True, metadata={"Date": None})
            print(folder / f"{name}.svg")


if __name__ == "__main__":
    main()
