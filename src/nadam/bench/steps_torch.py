"""Time a whole step of nadam.torch.NAdam against torch.optim.NAdam, fused Adam and the memory floor.

All are steps in turns on gradients that stay. "Full" is global-norm clipping, decoupled decay and a moving average: in
ours by its arguments, around PyTorch's by clip_grad_norm_ and foreach averages. Of bfloat16 parameters with a remainder
the step is compared with fused Adam on float32 ones.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from nadam.bench.cases import CASES, KINDS, Array, Case, random_arrays
from nadam.bench.floor import FORMS, Floor
from nadam.bench.measure import Work, in_turns, ratio
from nadam.bench.options import Options
from nadam.bench.peers import on_torch, torch_adam, torch_nadam
from nadam.bench.records import FLOOR, OURS, Timing
from nadam.torch import NAdam

# How many times as fast as torch.optim.NAdam and as fused Adam, and which share of the floor.
WANTED: dict[tuple[str, str], tuple[float, float, float | None]] = {
    ("161 tensors", "plain"): (5.0, 1.0, 0.93),
    ("161 tensors", "full"): (4.0, 1.8, None),
    ("300 x 1000", "plain"): (30.0, 9.0, None),
    ("300 x 1000", "full"): (20.0, 9.0, None),
    ("4 small", "plain"): (12.0, 4.0, None),
    ("4 small", "full"): (15.0, 9.0, None),
}
REMAINDER = "bfloat16 with remainder"


class Ours:
    """Our optimizer on a case, after its first steps."""

    def __init__(self, case: Case, kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> None:
        params, grads = (random_arrays(case.shapes, "float32", seed) for seed in (0, 1))
        self.params = [torch.nn.Parameter(torch.from_numpy(param).to(dtype)) for param in params]
        for param, grad in zip(self.params, grads, strict=True):
            param.grad = torch.from_numpy(grad).to(dtype)
        self.optimizer = NAdam(self.params, lr=1e-3, decoupled_weight_decay=True, **KINDS[kind], **options)
        for _ in range(2):
            self.optimizer.step()

    def moved(self) -> list[list[Any]]:
        """The memory that a step goes through, as `Floor` takes it."""
        states = [self.optimizer.state[param] for param in self.params]
        names = ["exp_avg", "exp_avg_sq", *["ema"] * ("ema" in states[0])]
        return [
            [param.detach().numpy() for param in self.params],
            [param.grad.numpy() for param in self.params],
            *([state[name].numpy() for state in states] for name in names),
        ]


def works(name: str, kind: str) -> tuple[list[str], list[Work], Any]:
    """What is timed in turns, by name; and what has to be kept."""
    case = CASES[name]
    if kind == REMAINDER:
        ours = Ours(case, "plain", torch.bfloat16, remainder=True)
        params, grads = arrays(case)
        peer = on_torch(torch_adam, params, grads, False)
        return [OURS, "fused Adam"], [ours.optimizer.step, peer.step], (ours, peer)
    ours = Ours(case, kind)
    peers = [on_torch(make, *arrays(case), full=kind == "full") for make in (torch_nadam, torch_adam)]
    floor = Floor(ours.moved(), kind, "float32")
    named: dict[str, Work] = {OURS: ours.optimizer.step, "NAdam": peers[0].step, "fused Adam": peers[1].step}
    return [*named, *floor.forms], [*named.values(), *floor.forms.values()], (ours, peers, floor)


def arrays(case: Case) -> tuple[list[Array], list[Array]]:
    """Parameters and gradients."""
    return random_arrays(case.shapes, "float32", 0), random_arrays(case.shapes, "float32", 1)


def units(options: Options) -> list[tuple[str, str]]:
    """Cases and kinds."""
    cases = options.chosen(list(dict.fromkeys(name for name, _ in WANTED)), ["300 x 1000"])
    return [(name, kind) for name in cases for kind in [*KINDS, *[REMAINDER] * (name == "161 tensors")]]


def measure(options: Options, name: str, kind: str) -> Iterator[Timing]:
    """A row for each peer, and one for the floor's faster form."""
    names, timed, kept = works(name, kind)
    for work in timed:
        work()
    found = in_turns(
        timed, small=CASES[name].small, clock=time.perf_counter, repeats=options.rounds, budget=options.budget
    )
    del kept
    samples = dict(zip(names, found, strict=True))
    floors = [samples.pop(form) for form in FORMS if form in samples]
    if floors:
        samples[FLOOR] = min(floors, key=median)
    bounds = dict(zip(("NAdam", "fused Adam", FLOOR), WANTED.get((name, kind), (None, 1.0, None)), strict=True))
    own = samples.pop(OURS)
    for against, times in samples.items():
        medians = median(own), median(times)
        yield Timing(options.heading, name, kind, against, *medians, ratio(times, own), bounds[against])
