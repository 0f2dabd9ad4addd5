"""Time a whole step of nadam.torch.NAdam against torch.optim.NAdam, fused Adam and the memory floor.

    python -m benchmarks.hosts_torch
    python -m benchmarks.hosts_torch --case "300 x 1000" --quick

All are steps in turns on gradients that stay. "Full" is global-norm clipping, decoupled decay and a moving average: in
ours by its arguments, around PyTorch's by clip_grad_norm_ and foreach averages. Of bfloat16 parameters with a remainder
the step is compared with fused Adam on float32 ones.
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch

from benchmarks.cases import CASES, KINDS, Case, random_arrays
from benchmarks.floor import Floor
from benchmarks.measure import Work, in_turns, ratio
from benchmarks.peers import _torch, _torch_adam, _torch_nadam
from benchmarks.report import Table, duration, progress
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
        peer = _torch(_torch_adam, *arrays(case), False)
        return ["ours", "fused Adam"], [ours.optimizer.step, peer.step], (ours, peer)
    ours = Ours(case, kind)
    peers = [_torch(make, *arrays(case), kind == "full") for make in (_torch_nadam, _torch_adam)]
    floor = Floor(ours.moved(), kind, "float32")
    named: dict[str, Work] = {"ours": ours.optimizer.step, "NAdam": peers[0].step, "fused Adam": peers[1].step}
    return [*named, *floor.forms], [*named.values(), *floor.forms.values()], (ours, peers, floor)


def arrays(case: Case) -> Sequence[Any]:
    return random_arrays(case.shapes, "float32", 0), random_arrays(case.shapes, "float32", 1)


def measured(name: str, kind: str, repeats: int) -> dict[str, list[float]]:
    """Seconds of a step of each, round by round."""
    names, timed, kept = works(name, kind)
    for work in timed:
        work()
    found = in_turns(timed, small=CASES[name].small, clock=time.perf_counter, repeats=repeats)
    del kept
    samples = dict(zip(names, found, strict=True))
    floors = [samples.pop(form) for form in list(samples) if form not in ("ours", "NAdam", "fused Adam")]
    if floors:
        samples["floor"] = min(floors, key=median)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hosts_torch", description=__doc__.splitlines()[0])
    cases = list(dict.fromkeys(name for name, _ in WANTED))
    parser.add_argument("--case", nargs="+", choices=cases, default=cases, help="only these")
    parser.add_argument("--repeats", type=int, help="samples per figure (default: 15; --quick: 5)")
    parser.add_argument("--quick", action="store_true", help="a first look")
    args = parser.parse_args()
    repeats = args.repeats or (5 if args.quick else 15)
    columns = [("case", -11), ("kind", -23), ("against", -10), ("ours", 8), ("theirs", 8), ("ratio", 6)]
    table = Table([*columns, ("wanted", 6), ("reached", 7)])
    for name in args.case:
        for kind in [*KINDS, *[REMAINDER] * (name == "161 tensors")]:
            progress(f"{name}, {kind}")
            samples = measured(name, kind, repeats)
            bounds = dict(
                zip(("NAdam", "fused Adam", "floor"), WANTED.get((name, kind), (None, 1.0, None)), strict=True)
            )
            for against in [other for other in samples if other != "ours"]:
                seen, bound = ratio(samples[against], samples["ours"]), bounds[against]
                cells = [name, kind, against, *(duration(median(samples[who])) for who in ("ours", against))]
                verdict = ["-", "-"] if bound is None else [f"{bound:.2f}", "yes" if seen >= bound else "no"]
                table.row([*cells, f"{seen:.2f}", *verdict])
            gc.collect()


if __name__ == "__main__":
    main()
