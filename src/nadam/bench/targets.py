"""What the package has to reach that is no ratio to the floor or to a peer, beside what was seen."""

from __future__ import annotations

import time
from collections.abc import Iterator

from nadam.bench.cases import CASES, KINDS, Ours, bytes_moved
from nadam.bench.measure import alone, in_turns, ratio
from nadam.bench.options import Options
from nadam.bench.probes import first_step_seconds, step_memory
from nadam.bench.records import Target
from nadam.bench.reference import rounding_ratio
from nadam.kernels.cpu.threads import get_num_threads, set_num_threads
from nadam.numpy import Nadam


def units(options: Options) -> list[tuple[str]]:
    """Each group of targets."""
    return [(name,) for name in TARGETS]


def measure(options: Options, name: str) -> Iterator[Target]:
    """The rows of one group."""
    try:
        yield from TARGETS[name](options.rounds)
    finally:
        set_num_threads(None)


def _below(what: str, bound: float, seen: float, unit: str, digits: int) -> Target:
    return Target(what, f"< {bound:.{digits}f} {unit}", f"{seen:.{digits + 1}f} {unit}", seen < bound)


def process_times(rounds: int) -> Iterator[Target]:
    """Process time of small steps, on one thread."""
    set_num_threads(1)
    for kind, bound in (("plain", 0.30), ("full", 0.70)):
        ours = Ours(CASES["300 x 1000"], kind, "float32")
        same = alone(ours.step, small=True, clock=time.process_time, repeats=rounds)
        yield _below(f"300 x 1000 {kind}, the same gradient arrays: process time", bound, 1e3 * same, "ms", 2)
        fresh = 1e3 * _fresh_gradients(ours, steps=20 * rounds)
        yield _below(f"300 x 1000 {kind}, fresh gradient arrays: process time", bound, fresh, "ms", 2)
    ours = Ours(CASES["4 small"], "plain", "float32")
    small = alone(ours.step, small=True, clock=time.process_time, repeats=rounds)
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


def bfloat16_speed(rounds: int) -> Iterator[Target]:
    """Bytes per second with bfloat16 over those with float32, measured in turns."""
    dtypes = ("bfloat16", "float32")
    works = [Ours(CASES["161 tensors"], "plain", dtype).step for dtype in dtypes]
    half_bytes, single_bytes = (bytes_moved("plain", dtype) for dtype in dtypes)
    for count in sorted({1, get_num_threads()}):
        set_num_threads(count)
        half, single = in_turns(works, small=False, clock=time.perf_counter, repeats=rounds)
        seen = ratio(single, half) * half_bytes / single_bytes
        what = f"161 tensors plain, threads: {count}: bytes/s of bfloat16 over float32"
        yield Target(what, ">= 0.85", f"{seen:.3f}", seen >= 0.85)


def memory(rounds: int) -> Iterator[Target]:
    """Memory of a step beyond parameters, gradients and state."""
    means = {"traced": "allocated (tracemalloc)", "resident": "growth of resident memory"}
    for name, figure in step_memory().items():
        yield _below(f"161 tensors, worst of plain and full: {means[name]}", 1.0, figure / 2**20, "MiB", 2)


def first_step(rounds: int) -> Iterator[Target]:
    """From the start of Python to the end of the first step."""
    seen = first_step_seconds(min(rounds, 5))
    yield _below("python -c with imports and a first step, warm cache", 1.0, seen, "s", 1)


def rounding(rounds: int) -> Iterator[Target]:
    """Error against float64, over what rounding the parameters alone costs."""
    draws = min(rounds, 5)
    for kind, settings in KINDS.items():
        ratios = [rounding_ratio(Nadam(**settings), kind == "full", seed) for seed in range(draws)]
        what = f"float32 {kind}, 1000 steps, worst of seeds 0 to {draws - 1}: error over that of rounding"
        yield Target(what, "<= 1.10", f"{max(ratios):.3f}", max(ratios) <= 1.1)


TARGETS = {
    "process time": process_times,
    "bfloat16": bfloat16_speed,
    "memory": memory,
    "first step": first_step,
    "rounding": rounding,
}
