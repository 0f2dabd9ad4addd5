"""How a step grows: with the size of one tensor, and with the number of tensors of 1,000; a hot loop of steps in turns.

Small steps are many to a sample. A size for which there is not enough memory is left out.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

from nadam.bench.cases import Case, Ours, random_arrays
from nadam.bench.floor import Floor
from nadam.bench.measure import Work, in_turns
from nadam.bench.options import Options
from nadam.bench.peers import Running, on_numpy, on_torch, torch_adam, torch_nadam
from nadam.bench.records import FLOOR, OURS, Growth

PARAMETERS, TENSORS = "parameters", "tensors"
SIZES = {PARAMETERS: [10**n for n in range(3, 9)], TENSORS: [1, 3, 10, 30, 100, 300, 1000, 3000]}
QUICK = {PARAMETERS: [10**3, 10**5, 10**6], TENSORS: [1, 30, 300]}
NEEDED = 100  # bytes for each parameter, all contestants together
SMALL = 10**6  # parameters up to which steps are timed many at once


def units(options: Options) -> list[tuple[str, int]]:
    """Axes and sizes that there is memory for; for a quick look on NumPy only."""
    if options.models or (options.quick and options.host != "numpy"):
        return []
    sizes = QUICK if options.quick else SIZES
    found = [(axis, size) for axis in sizes for size in sizes[axis]]
    return [(axis, size) for axis, size in found if NEEDED * _count(axis, size) < free_memory()]


def measure(options: Options, axis: str, size: int) -> Iterator[Growth]:
    """Ours, the floor and the host's peers."""
    case = Case(((size,),) if axis == PARAMETERS else ((1000,),) * size, small=_count(axis, size) <= SMALL)
    own: Work
    moved: Sequence[Sequence[Any]]
    peers: dict[str, Callable[..., Running]]
    if options.host == "torch":
        from nadam.bench.steps_torch import Ours as OursTorch

        ours_torch = OursTorch(case, "plain")
        own, moved = ours_torch.optimizer.step, ours_torch.moved()
        peers = {"NAdam": partial(on_torch, torch_nadam), "fused Adam": partial(on_torch, torch_adam)}
    else:
        ours = Ours(case, "plain", "float32")
        own, moved = ours.step, ours.moved
        peers = {"NumPy": on_numpy}
    started: dict[str, Running] = {
        who: start(random_arrays(case.shapes, "float32", 0), random_arrays(case.shapes, "float32", 1), False)
        for who, start in peers.items()
    }
    floor = Floor(moved, "plain", "float32", forms=["one loop"])
    works: dict[str, Work] = {OURS: own, **{who: running.step for who, running in started.items()}}
    works[FLOOR] = floor.forms["one loop"]
    for work in works.values():
        work()
    samples = in_turns(
        list(works.values()), small=case.small, clock=time.perf_counter, repeats=options.rounds, budget=options.budget
    )
    for who, times in zip(works, samples, strict=True):
        yield Growth(options.heading, axis, size, who, median(times))


def _count(axis: str, size: int) -> int:
    return size if axis == PARAMETERS else 1000 * size


def free_memory() -> int:
    """Bytes that are free, by the system's own count; 1 GiB where it does not tell."""
    names: Any = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" in names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 1 << 30
