"""Time a step of nadam.Nadam in every case and number format against the floor and every optimizer that is installed.

The small cases run many steps to a sample, on one thread in process time. A peer is measured after ours, on arrays of
its own, with fewer samples: of such a row the ratio is that of the medians.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import product
from statistics import median

from nadam.bench.cases import CASES, KINDS, WIDTHS, Case, Ours, random_arrays
from nadam.bench.floor import Floor
from nadam.bench.measure import alone, clock_for, in_turns, ratio
from nadam.bench.options import Options
from nadam.bench.peers import PEERS, Peer, limited_to, runs
from nadam.bench.records import FLOOR, Timing
from nadam.kernels.cpu.threads import get_num_threads, set_num_threads

PEER_REPEATS, PEER_BUDGET = 5, 0.4  # samples, and seconds spent on them, of one peer in one row
LARGE, OF_FLOOR = ("161 tensors", "32M"), 0.93  # the cases in which float32 has to reach this share of the floor


def units(options: Options) -> list[tuple[str, str, str]]:
    """Cases, kinds and number formats."""
    dtypes = ["float32"] if options.quick else list(WIDTHS)
    return list(product(options.chosen(list(CASES), ["300 x 1000"]), KINDS, dtypes))


def measure(options: Options, name: str, kind: str, dtype: str) -> Iterator[Timing]:
    """With each number of threads a row for the floor and for each peer."""
    case, counts = CASES[name], sorted({1, get_num_threads()})
    try:
        ours = dict(zip(counts, ours_and_floor(case, kind, dtype, counts, options.rounds), strict=True))
    finally:
        set_num_threads(None)
    for count, (own, floor) in ours.items():
        wanted = OF_FLOOR if name in LARGE and dtype == "float32" else None
        medians = median(own), median(floor)
        yield Timing(options.heading, label(name, dtype, count), kind, FLOOR, *medians, ratio(floor, own), wanted)
    for peer in [peer for peer in PEERS if peer.installed]:
        for count, theirs in peer_times(peer, case, kind, dtype, counts, min(options.rounds, PEER_REPEATS)):
            own_median = median(ours[count][0])
            compared = peer.name, own_median, theirs, theirs / own_median
            yield Timing(options.heading, label(name, dtype, count), kind, *compared)


def label(name: str, dtype: str, threads: int) -> str:
    """A row's heading."""
    return f"{name}, {dtype}, {threads} thread{'s' * (threads > 1)}"


def ours_and_floor(
    case: Case, kind: str, dtype: str, threads: list[int], repeats: int
) -> Iterator[tuple[list[float], list[float]]]:
    """Seconds round by round of ours and of the floor's faster form, with each number of threads."""
    ours = Ours(case, kind, dtype)
    floor = Floor(ours.moved, kind, dtype)
    for count in threads:
        set_num_threads(count)
        works = [ours.step, *floor.forms.values()]
        for work in works:
            work()
        own, *floors = in_turns(works, small=case.small, clock=clock_for(case.small, count), repeats=repeats)
        yield own, min(floors, key=median)


def peer_times(
    peer: Peer, case: Case, kind: str, dtype: str, threads: list[int], repeats: int
) -> Iterator[tuple[int, float]]:
    """Seconds per step with each number of threads; nothing where the peer does not do the case."""
    params, grads = random_arrays(case.shapes, dtype, 0), random_arrays(case.shapes, dtype, 1)
    try:
        running = peer.start(params, grads, kind == "full")
        if not runs(running):
            return
    except Exception as error:  # whatever another project raises where it has no such thing
        reason = str(error).partition("\n")[0][:100]
        print(f"{peer.name}: {kind} {dtype}: {type(error).__name__}: {reason}", file=sys.stderr)
        return
    for count in threads:
        clock = clock_for(case.small, count)
        with limited_to(count, peer):
            yield count, alone(running.step, small=case.small, clock=clock, repeats=repeats, budget=PEER_BUDGET)
