"""Clocks: several pieces of work timed in turns, so that what else the machine does slows all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from math import inf
from statistics import median
from time import perf_counter

Work = Callable[[], object]
Clock = Callable[[], float]

SAMPLE = 0.01  # seconds that one sample of a small piece of work lasts


def clock_for(small: bool, threads: int) -> Clock:
    """Process time for small work on one thread, which other processes cannot lengthen; otherwise time on the wall."""
    return time.process_time if small and threads == 1 else time.perf_counter


def calls_per_sample(work: Work, clock: Clock) -> int:
    """How often to call small work between two looks at the clock."""
    calls = 1
    while True:
        start = clock()
        for _ in range(calls):
            work()
        elapsed = clock() - start
        if elapsed >= SAMPLE / 4:
            return max(1, round(calls * SAMPLE / elapsed))
        calls *= 4


def in_turns(
    works: Sequence[Work], *, small: bool, clock: Clock, repeats: int, budget: float = inf
) -> list[list[float]]:
    """Seconds that each piece of work takes, round by round; each has run before, so that nothing is compiled now.

    After ``budget`` seconds the rounds end, of which there is at least one.
    """
    calls = [calls_per_sample(work, clock) if small else 1 for work in works]
    samples: list[list[float]] = [[] for _ in works]
    begin = perf_counter()
    while len(samples[0]) < repeats and not (samples[0] and perf_counter() - begin > budget):
        for work, count, seen in zip(works, calls, samples, strict=True):
            start = clock()
            for _ in range(count):
                work()
            seen.append((clock() - start) / count)
    return samples


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of one time over another: whatever slows a round slows both."""
    return median(a / b for a, b in zip(above, below, strict=True))


def alone(work: Work, *, small: bool, clock: Clock, repeats: int, budget: float = inf) -> float:
    """Median seconds of one piece of work; once it has taken ``budget`` seconds the repeats end."""
    return median(in_turns([work], small=small, clock=clock, repeats=repeats, budget=budget)[0])
