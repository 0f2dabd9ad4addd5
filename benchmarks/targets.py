"""What the package has to reach, beside what was seen: the table of the issue, row by row."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import nadam
from benchmarks.cases import CASES, KINDS, Ours, bytes_moved
from benchmarks.measure import alone, in_turns, ratio
from benchmarks.probes import first_step_seconds, step_memory
from benchmarks.reference import rounding_ratio

Key = tuple[str, str, str, int]  # case, kind, dtype, threads


class Target(NamedTuple):
    """One figure to reach; `reached` is None where it was not measured."""

    what: str
    wanted: str
    seen: str
    reached: bool | None


def _at_least(what: str, bound: float, seen: float) -> Target:
    return Target(what, f">= {bound:.2f}", f"{seen:.3f}", seen >= bound)


def _below(what: str, bound: float, seen: float, unit: str, digits: int) -> Target:
    return Target(what, f"< {bound:.{digits}f} {unit}", f"{seen:.{digits + 1}f} {unit}", seen < bound)


def floor_shares(shares: Mapping[Key, float], threads: list[int]) -> Iterator[Target]:
    """Speed against the floor, from the table above."""
    for case in ("161 tensors", "32M"):
        for kind in KINDS:
            for count in threads:
                what = f"{case} float32 {kind}, {_threads(count)}: share of the floor"
                share = shares.get((case, kind, "float32", count))
                yield Target(what, ">= 0.93", "not run", None) if share is None else _at_least(what, 0.93, share)


def process_times(repeats: int) -> Iterator[Target]:
    """Process time of small steps, on one thread."""
    nadam.set_num_threads(1)
    for kind, bound in (("plain", 0.30), ("full", 0.70)):
        ours = Ours(CASES["300 x 1000"], kind, "float32")
        clock = time.process_time
        same = alone(ours.step, small=True, clock=clock, repeats=repeats)
        yield _below(f"300 x 1000 {kind}, the same gradient arrays: process time", bound, 1e3 * same, "ms", 2)
        fresh = 1e3 * _fresh_gradients(ours, steps=20 * repeats)
        yield _below(f"300 x 1000 {kind}, fresh gradient arrays: process time", bound, fresh, "ms", 2)
    ours = Ours(CASES["4 small"], "plain", "float32")
    small = alone(ours.step, small=True, clock=time.process_time, repeats=repeats)
    yield _below("4 small plain: process time", 20, 1e6 * small, "us", 0)


def _fresh_gradients(ours: Ours, steps: int) -> float:
    """Seconds per step, the mean, when every step gets new arrays; making them is not counted."""
    spent = 0.0
    for _ in range(steps):
        ours.grads = [grad.copy() for grad in ours.grads]
        start = time.process_time()
        ours.step()
        spent += time.process_time() - start
    return spent / steps


def bfloat16_speed(repeats: int, threads: list[int]) -> Iterator[Target]:
    """Bytes per second with bfloat16 over those with float32, measured in turns."""
    dtypes = ("bfloat16", "float32")
    pair = [Ours(CASES["161 tensors"], "plain", dtype) for dtype in dtypes]
    half_bytes, single_bytes = (bytes_moved("plain", dtype) for dtype in dtypes)
    for count in threads:
        nadam.set_num_threads(count)
        works = [ours.step for ours in pair]
        half, single = in_turns(works, small=False, clock=time.perf_counter, repeats=repeats)
        seen = ratio(single, half) * half_bytes / single_bytes
        yield _at_least(f"161 tensors plain, {_threads(count)}: bytes/s of bfloat16 over float32", 0.85, seen)


def memory() -> Iterator[Target]:
    """Memory of a step beyond parameters, gradients and state."""
    means = {"traced": "allocated (tracemalloc)", "resident": "growth of resident memory"}
    for name, figure in step_memory().items():
        yield _below(f"161 tensors, worst of plain and full: {means[name]}", 1.0, figure / 2**20, "MiB", 2)


def first_step(repeats: int) -> Iterator[Target]:
    seen = first_step_seconds(repeats)
    yield _below("python -c with imports and a first step, warm cache", 1.0, seen, "s", 1)


def rounding(draws: int) -> Iterator[Target]:
    """Error against float64, over what rounding the parameters alone costs."""
    for kind, settings in KINDS.items():
        ratios = [rounding_ratio(nadam.Nadam(**settings), kind == "full", seed) for seed in range(draws)]
        what = f"float32 {kind}, 1000 steps, worst of seeds 0 to {draws - 1}: error over that of rounding"
        yield Target(what, "<= 1.10", f"{max(ratios):.3f}", max(ratios) <= 1.1)


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def targets(shares: Mapping[Key, float], threads: list[int], repeats: int) -> Iterator[Target]:
    """Every row, each measured as it is asked for."""
    yield from floor_shares(shares, threads)
    yield from process_times(repeats)
    yield from bfloat16_speed(repeats, threads)
    yield from memory()
    yield from first_step(min(repeats, 5))
    yield from rounding(draws=min(repeats, 5))
