"""Train a transformer and a convolutional net with fewer bytes per parameter, and show what docs/fewer-bytes.md does.

python -m benchmarks.fewer_bytes                 # the record is docs/data/fewer_bytes.json
python -m benchmarks.fewer_bytes --part memory   # one part of it again
python -m benchmarks.fewer_bytes --draw          # only the picture and the tables, from the record
python -m benchmarks.fewer_bytes --quick --docs /tmp/quick

torchao and bitsandbytes take part where they can be imported:

pip install --no-deps --target /tmp/peers torchao bitsandbytes
PYTHONPATH=/tmp/peers python -m benchmarks.fewer_bytes

All of a seed begin with the same weights, but for their rounding to bfloat16, and see the same batches.
"""

from __future__ import annotations

import ctypes
import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchmarks.convergence import Task, advance, arguments, digits_task, save, text_task, train
from benchmarks.fewer_bytes_report import report
from torch import Tensor, nn

from nadam.torch import NAdamW

SEEDS = {"text": 3, "conv": 10}  # on digits an error in the last bit moves the loss by a percent
RATES = {"text": 2e-3, "conv": 4e-3}
PARTS = [*RATES, "bytes", "memory"]
WIDTH, LAYERS = 1024, 20  # of the model whose memory is measured
PEERS = ("torchao", "bitsandbytes")


class Contestant(NamedTuple):
    """An optimizer, given the parameters and a seed, and the dtype of the parameters."""

    make: Callable[..., torch.optim.Optimizer]
    dtype: torch.dtype = torch.float32


def ours(dtype: torch.dtype = torch.float32, **settings: Any) -> Contestant:
    return Contestant(lambda params, seed, **more: NAdamW(params, seed=seed, **settings, **more), dtype)


def theirs(module: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Contestant:
    def make(params: Any, seed: int, **more: Any) -> Any:
        name = "AdamW" if module == "torch.optim" else "AdamW8bit"
        return getattr(import_module(module), name)(params, **settings, **more)

    return Contestant(make, dtype)


HALF = torch.bfloat16
CONTESTANTS = {
    "float32": ours(),
    "float32, nudged": ours(),
    "float32, 8-bit": ours(state_bits=8),
    "bfloat16 + 16": ours(HALF, remainder=16),
    "bfloat16 + 8": ours(HALF, remainder=8),
    "bfloat16 + 8, 8-bit": ours(HALF, remainder=8, state_bits=8),
    "bfloat16 alone": ours(HALF),
    "AdamW": theirs("torch.optim", fused=True),
    "AdamW8bit, torchao": theirs("torchao.optim"),
    "AdamW8bit, bitsandbytes": theirs("bitsandbytes.optim"),
    "AdamW8bit, torchao, bfloat16": theirs("torchao.optim", HALF, bf16_stochastic_round=True),
}


def installed() -> list[str]:
    """Those that can take part."""
    missing = [peer for peer in PEERS if peer not in versions()]
    return [name for name in CONTESTANTS if not any(peer in name for peer in missing)]


def versions() -> dict[str, str]:
    """Of the peers that are installed."""
    found = {}
    for peer in PEERS:
        try:
            found[peer] = version(peer)
        except PackageNotFoundError:
            print(f"no {peer}: nothing is compared with its AdamW8bit")
    return found


def conv() -> nn.Module:
    """Of 105,866 parameters, all but 906 of them in three tensors that are large enough to be compressed."""
    first, second = (nn.Conv2d(*channels, 3, stride=2, padding=1) for channels in ((1, 16), (16, 32)))
    hidden, end = nn.Linear(32 * 7 * 7, 64), nn.Linear(64, 10)
    begin = (nn.Unflatten(1, (1, 28, 28)), first, nn.ReLU(), second, nn.ReLU(), nn.Flatten())
    return nn.Sequential(*begin, hidden, nn.ReLU(), end)


@cache
def task_of(part: str) -> Task:
    if part == "conv":
        return digits_task(convolutional=True)._replace(make=conv)
    return text_task(warmup=40, width=128, layers=4)._replace(steps=400, batch=8)


def task_for(task: Task, name: str) -> Task:
    """The same task with a contestant's dtype."""
    dtype = CONTESTANTS[name].dtype

    def make() -> nn.Module:
        model = task.make()
        if name.endswith("nudged"):  # what an error in the last bit of each weight comes to, in training
            with torch.no_grad():
                for param in model.parameters():
                    param.copy_(param.nextafter(torch.tensor(torch.inf)))
        return model.to(dtype)

    inputs, targets = task.train
    return task._replace(make=make, train=(inputs.to(dtype) if inputs.is_floating_point() else inputs, targets))


def study(part: str, name: str, steps: int | None, seeds: int) -> dict[str, Any]:
    """Train with one contestant from every seed."""
    torch.set_num_threads(1)
    task = task_for(task_of(part), name)
    task = task._replace(steps=steps or task.steps)
    optimizer = partial(CONTESTANTS[name].make, lr=RATES[part])
    runs = [train(task, partial(optimizer, seed=seed), seed) for seed in range(seeds)]
    print(f"{part:5} {name:30}", *(run["held_out"][-1] for run in runs), flush=True)
    return {what: [run[what] for run in runs] for what in runs[0]}


def studied(part: str, quick: bool) -> dict[str, Any]:
    """Train with every contestant from every seed, two at a time."""
    task, names = task_of(part), installed()
    steps, seeds = (2, 2) if quick else (None, SEEDS[part])
    sizes = [param.numel() for param in task.make().parameters()]
    found: dict[str, Any] = {"parameters": sum(sizes), "large": sum(size for size in sizes if size >= 4096)}
    found |= {"rate": RATES[part], "steps": steps or task.steps, "batch": task.batch, "peers": versions()}
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        runs = [pool.submit(study, part, name, steps, seeds) for name in names]
        return found | {"runs": {name: run.result() for name, run in zip(names, runs, strict=True)}}


def tensors(value: Any) -> Iterator[Tensor]:
    """A tensor, or those that a subclass of it is made of."""
    if hasattr(value, "__tensor_flatten__"):
        yield from (getattr(value, name) for name in value.__tensor_flatten__()[0])
    elif isinstance(value, Tensor) and value.dim():
        yield value


def counted(name: str) -> dict[str, float]:
    """Bytes for each element of a weight of a million, counted from its tensors after a step."""
    contestant = CONTESTANTS[name]
    param = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=contestant.dtype))
    optimizer = contestant.make([param], seed=0)
    param.grad = torch.ones_like(param)
    optimizer.step()
    found = dict.fromkeys(("parameter", "remainder", "moments", "scales"), 0.0)
    found["parameter"] = param.itemsize
    for key, value in optimizer.state[param].items():
        for tensor in tensors(value):
            large = tensor.numel() >= param.numel()
            kind = "scales" if not large else "remainder" if key == "remainder" else "moments"
            found[kind] += tensor.nbytes / param.numel()
    return {kind: round(number, 4) for kind, number in found.items()}


def megabytes(what: str) -> float:
    """Resident memory of this process, on Linux: VmRSS now, VmHWM at its peak.

    Not ru_maxrss, which a process inherits from the one that started it.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) * 1024 / 1e6


def measured(name: str, layers: int) -> dict[str, float]:
    """Peak resident memory of a training run, in MB, in a process of its own; and what it had before the model."""

    def trained(layers: int, steps: int) -> int:
        contestant = CONTESTANTS[name]
        linear = partial(nn.Linear, WIDTH, WIDTH, dtype=contestant.dtype)
        model = nn.Sequential(*(module for _ in range(layers) for module in (linear(), nn.ReLU())))
        optimizer = contestant.make(model.parameters(), seed=0)
        inputs, targets = torch.randn(16, WIDTH, dtype=contestant.dtype), torch.zeros(16, dtype=torch.int64)
        for _ in range(steps):
            advance(model, optimizer, inputs, targets)
        return sum(param.numel() for param in model.parameters())

    trained(1, 2)  # whatever is imported and compiled
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = megabytes("VmRSS")
    parameters = trained(layers, 5)
    peak = megabytes("VmHWM")
    print(f"memory {name:30} {before:.0f} {peak:.0f} {(peak - before) * 1e6 / parameters:.2f}", flush=True)
    return {"before": round(before), "peak": round(peak), "parameters": parameters}


def memory(quick: bool) -> dict[str, Any]:
    """The middle one of three runs, each in a process of its own."""
    names = [name for name in installed() if "nudged" not in name]
    layers, times = (2, 1) if quick else (LAYERS, 3)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        runs = {name: [pool.submit(measured, name, layers) for _ in range(times)] for name in names}
        found = {name: [run.result() for run in tried] for name, tried in runs.items()}
    return {name: sorted(tried, key=lambda run: run["peak"])[times // 2] for name, tried in found.items()}


def main() -> None:
    args = arguments(__doc__.splitlines()[0], PARTS)
    docs, path = args.docs, args.docs / "data" / "fewer_bytes.json"
    for part in [] if args.draw else args.part or PARTS:
        if part == "bytes":
            found = {name: counted(name) for name in installed() if "nudged" not in name}
        elif part == "memory":
            found = memory(args.quick)
        else:
            found = studied(part, args.quick)
        save(path, part, found)
    record = json.loads(path.read_text())
    if {*PARTS} <= record["parts"].keys():
        report(record, docs / "images")


if __name__ == "__main__":
    main()
