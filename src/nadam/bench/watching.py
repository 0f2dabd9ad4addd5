"""What watching costs in a training loop of an MLP: whole training steps of all variants in turns, in one process."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from nadam import watch
from nadam.bench.loops import MLP, Sample, in_loops
from nadam.bench.measure import ratio
from nadam.bench.options import Options
from nadam.bench.records import Timing

# Settings of the optimizer, and every how many steps a row is written; None for none.
UNWATCHED = "plain"
VARIANTS: dict[str, tuple[dict[str, Any], int | None]] = {
    UNWATCHED: ({}, None),
    "plain, again": ({}, None),
    "a row at every step": ({}, 1),
    "a row every 100 steps": ({}, 100),
    "track_grad_norm": ({"track_grad_norm": True}, None),
    "track_grad_norm, a row at every step": ({"track_grad_norm": True}, 1),
}


def units(options: Options) -> list[tuple[str]]:
    """The one model."""
    return [(name,) for name in options.chosen([MLP], [MLP])]


def measure(options: Options, name: str) -> Iterator[Timing]:
    """A row for each variant, whose ratio is its time over that of the unwatched loop."""
    training_step = {"numpy": _on_numpy, "torch": _on_torch}[options.host]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        samples: dict[str, Sample] = {}
        for i, (variant, (settings, every)) in enumerate(VARIANTS.items()):
            step, optimizer = training_step(name, settings)
            after = None
            if every is not None:
                after = watch.Watch(optimizer, watch.CSV(folder / f"{i}.csv"), every=every).after_step
            samples[variant] = _sample(step, after)
        seen = in_loops(samples, 10 * options.rounds, budget=10 * options.budget)
    plain = seen.pop(UNWATCHED)
    for variant, times in seen.items():
        yield Timing(options.heading, name, "plain", variant, median(plain), median(times), ratio(times, plain))


def _sample(step: Callable[[], None], after: Callable[[], Any] | None) -> Sample:
    def sample() -> float:
        begin = time.perf_counter()
        step()
        if after is not None:
            after()
        return time.perf_counter() - begin

    return sample


def _on_numpy(name: str, settings: dict[str, Any]) -> tuple[Callable[[], None], Any]:
    """A training step, and its optimizer."""
    from nadam.bench.loops_numpy import gradients, inputs, network
    from nadam.numpy import Nadam

    params, given = network(name), inputs(name)
    optimizer = Nadam(1e-4, **settings)
    optimizer.build(params)
    return lambda: optimizer.apply(gradients(params, given)), optimizer


def _on_torch(name: str, settings: dict[str, Any]) -> tuple[Callable[[], None], Any]:
    """A training step, and its optimizer."""
    from nadam.bench.loops_torch import model_of
    from nadam.torch import NAdam

    model, given = model_of(name)
    optimizer = NAdam(model.parameters(), lr=1e-4, **settings)

    def step() -> None:
        optimizer.zero_grad()
        model(given).pow(2).mean().backward()
        optimizer.step()

    return step, optimizer
