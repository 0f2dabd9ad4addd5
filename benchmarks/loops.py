"""Real models for the training loops that `loops_*` time: their sizes, and how."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.measure import ratio
from benchmarks.report import Table, duration, progress

# Units of a dense network by layers, batch; the others are built by each library.
DENSE = {
    "MLP, 0.27M": ([784, 256, 256, 10], 64),
    "60 small layers": ([64] * 61, 32),
    "20 layers, 21M": ([1024] * 21, 8),
}
TRANSFORMER, CONVOLUTIONS = "transformer, 0.8M", "convolutional net"
MODELS = ["MLP, 0.27M", "60 small layers", TRANSFORMER, CONVOLUTIONS, "20 layers, 21M"]
KINDS = ("plain", "full")  # full: clipping by the global norm, decoupled decay, moving average; of a peer its recipe
WARM_UP = 3

Sample = Callable[[], float]  # trains once more; gives the seconds of what is timed


def in_loops(samples: Mapping[str, Sample], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds round by round: in each, every loop in its turn takes some steps, the first of which are not counted."""
    seen: dict[str, list[float]] = {name: [] for name in samples}
    for i in range(rounds + WARM_UP):
        for name, sample in samples.items():
            taken = [sample() for _ in range(steps)]
            if i >= WARM_UP:
                seen[name].append(median(taken[1:]))
    return seen


def report(
    name: str,
    what: str,
    loops: Callable[[str, str], Mapping[str, Sample]],
    wanted: Mapping[tuple[str, str], Mapping[str, float]],
    less: str | None = None,
    models: Sequence[str] = MODELS,
) -> None:
    """Time every model and kind, and print a row for each peer.

    ``wanted`` are ratios of theirs to ours by model and kind; ``less`` is a loop whose time is taken from the others'.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=what)
    parser.add_argument("--model", nargs="+", choices=models, default=models, help="only these")
    parser.add_argument("--rounds", type=int, default=12, help="rounds, each a sample of every loop")
    parser.add_argument("--steps", type=int, default=6, help="training steps of a loop in a round")
    args = parser.parse_args()
    columns = [("model", -17), ("kind", -5), ("against", -22), ("ours", 8), ("theirs", 8), ("ratio", 6)]
    table = Table([*columns, ("wanted", 6), ("reached", 7)])
    for model in args.model:
        for kind in KINDS:
            progress(f"{model}, {kind}")
            seen = in_loops(loops(model, kind), args.rounds, args.steps)
            base = seen.pop(less) if less else None
            if base is not None:
                seen = {who: [a - b for a, b in zip(times, base, strict=True)] for who, times in seen.items()}
            bounds = wanted.get((model, kind), {})
            for against in [who for who in seen if who != "ours"]:
                found, bound = ratio(seen[against], seen["ours"]), bounds.get(against)
                cells = [model, kind, against, *(duration(median(seen[who])) for who in ("ours", against))]
                verdict = ["-", "-"] if bound is None else [f"{bound:.2f}", "yes" if found >= bound else "no"]
                table.row([*cells, f"{found:.2f}", *verdict])


def full_settings() -> dict[str, Any]:
    """What "full" is in ours, by the names that all hosts share."""
    return {"global_clipnorm": 1.0, "weight_decay": 1e-4, "use_ema": True}
