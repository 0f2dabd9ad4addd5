"""Real models for the training loops that `loops_*` time: their sizes, and how."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import inf
from statistics import median
from typing import Any, Protocol

from nadam.bench.measure import ratio
from nadam.bench.options import Options
from nadam.bench.records import COMPRESSED, OURS, Timing

# Units of a dense network by layers, batch; the others are built by each library.
MLP, SMALL, BIG = "MLP, 0.27M", "60 small layers", "20 layers, 21M"
DENSE = {
    MLP: ([784, 256, 256, 10], 64),
    SMALL: ([64] * 61, 32),
    BIG: ([1024] * 21, 8),
}
TRANSFORMER, CONVOLUTIONS = "transformer, 0.8M", "convolutional net"
MODELS = (MLP, SMALL, TRANSFORMER, CONVOLUTIONS, BIG)
KINDS = ("plain", "full")  # full: clipping by the global norm, decoupled decay, moving average; of a peer its recipe
FLOAT32 = "ours, float32"  # beside ours in 8 bits
WARM_UP, STEPS = 3, 6  # rounds that are not counted; training steps of a loop in a round
QUICK_WARM_UP, QUICK_STEPS = 1, 2
NOISE = 0.05  # of a training step; a difference of two that is less says nothing

Sample = Callable[[], float]  # trains once more; gives the seconds of what is timed


class Loops(Protocol):
    """A module of training loops.

    Attributes:
        MODELS: Those of `MODELS` that it has.
        WANTED: Ratios of theirs to ours to reach, by model, kind and whose.
        QUICK_MODELS: Those of a quick look.
        LESS: The loop whose time is taken from the others'; None for none.
    """

    MODELS: Sequence[str]
    WANTED: Mapping[tuple[str, str], Mapping[str, float]]
    QUICK_MODELS: Sequence[str]
    LESS: str | None
    COMPRESSED_MODELS: Sequence[str]  # those that are also timed with state of 8 bits

    def loops(self, name: str, kind: str, quick: bool = False) -> Mapping[str, Sample]:
        """A sample of each contestant on a model of its own, "ours" among them."""


def in_loops(
    samples: Mapping[str, Sample], rounds: int, steps: int = STEPS, warm_up: int = WARM_UP, budget: float = inf
) -> dict[str, list[float]]:
    """Seconds round by round: in each, every loop in its turn takes some steps, the first of which are not counted.

    After ``budget`` seconds the rounds end, of which there is at least one.
    """
    seen: dict[str, list[float]] = {name: [] for name in samples}
    begin = time.perf_counter()
    for i in range(rounds + warm_up):
        if i > warm_up and time.perf_counter() - begin > budget:
            break
        for name, sample in samples.items():
            taken = [sample() for _ in range(steps)]
            if i >= warm_up:
                seen[name].append(median(taken[1:]))
    return seen


def units(module: Loops, options: Options) -> list[tuple[str, str]]:
    """The models and kinds to time."""
    kinds = KINDS[:1] if options.quick else KINDS
    models = options.chosen(module.MODELS, module.QUICK_MODELS)
    smaller = () if options.quick else getattr(module, "COMPRESSED_MODELS", ())
    return [*((m, kind) for m in models for kind in kinds), *((m, COMPRESSED) for m in models if m in smaller)]


def measure(module: Loops, options: Options, model: str, kind: str) -> Iterator[Timing]:
    """Time all loops of a model; a row for each peer."""
    samples = module.loops(model, kind, options.quick)
    if options.quick:
        seen = in_loops(samples, options.rounds, QUICK_STEPS, QUICK_WARM_UP, options.budget)
    else:
        seen = in_loops(samples, options.rounds)
    beyond = less(seen, module.LESS) if module.LESS else seen
    # Where ours is lost in the noise, whole steps, with what would have been taken from them beside.
    # Ours and one to compare it with; else whole steps are.
    seen, kind = (beyond, kind) if OURS in beyond and len(beyond) > 1 else (seen, f"{kind}, whole step")
    wanted = module.WANTED.get((model, kind), {})
    own = seen.pop(OURS)
    for against, times in seen.items():
        medians = median(own), median(times)
        yield Timing(options.heading, model, kind, against, *medians, ratio(times, own), wanted.get(against))


def less(seen: Mapping[str, list[float]], base: str) -> dict[str, list[float]]:
    """Seconds beyond those of a loop; nothing of what takes so little more that the difference is noise."""
    found = {who: [a - b for a, b in zip(times, seen[base], strict=True)] for who, times in seen.items()}
    least = NOISE * median(seen[base])
    return {who: times for who, times in found.items() if median(times) > least}


def full_settings() -> dict[str, Any]:
    """What "full" is in ours, by the names that all hosts share."""
    return {"global_clipnorm": 1.0, "weight_decay": 1e-4, "use_ema": True}


def floor_step(
    params: Sequence[Any], kind: str, default_threads: Callable[[], int] | None = None
) -> Callable[[Sequence[Any]], None]:
    """What moves the bytes of a step, called with the gradients, which may be others each time.

    Of float32 arrays, or, with state of 8 bits, of bfloat16 ones as uint16.
    """
    small = kind == COMPRESSED  # the third is then the remainder
    state = [
        [param.astype("uint8" if small else param.dtype) * 0 for param in params] for _ in range(2 + (kind != "plain"))
    ]
    made: list[Any] = []

    def step(grads: Sequence[Any]) -> None:
        if not made:
            from nadam.bench.floor import Floor  # with Numba, which takes a second

            dtype = COMPRESSED if small else "float32"
            made.append(Floor([params, grads, *state], kind, dtype, default_threads, ["one loop"]))
        made[0].point_to(1, grads)
        made[0].forms["one loop"]()

    return step
