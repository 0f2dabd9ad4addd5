"""Check, then time, a step of nadam.torch.NAdam on an NVIDIA GPU against PyTorch's optimizers and a copy of memory.

Times are medians between CUDA events; "host" is how long a call keeps the host. "Full" is global-norm clipping,
decoupled decay and a moving average: in ours by its arguments, around PyTorch's by clip_grad_norm_ and foreach
averages. The floor is the time in which a copy of 2 GiB would move the bytes of a step, each once.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import product
from statistics import median
from typing import Any

import torch

from nadam.bench.cases import CASES
from nadam.bench.options import Options
from nadam.bench.records import FLOOR, OURS, Timing, duration
from nadam.torch import NAdam

Shapes = Sequence[tuple[int, ...]]
Work = Callable[[], object]

CHECK, LARGE = "the same as on the CPU", 512 << 20
BILLIONS = "7B, scaled to memory"
SIZES: dict[str, Shapes | None] = {
    "512M": [(LARGE,)],
    BILLIONS: None,
    "ResNet-50": CASES["161 tensors"].shapes,
    "300 x 1000": CASES["300 x 1000"].shapes,
}
KINDS = ("plain", "full")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "bfloat16+16": torch.bfloat16}
FULL: dict[str, Any] = {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True}
FLUSHED = 256 << 20  # bytes that are written between two steps, so that nothing is left of the last one's
SMALL = 1 << 25  # elements below which steps are timed many at once, and in a CUDA graph


def billions(free: int, bytes_per_element: int) -> list[tuple[int, ...]]:
    """The shapes of a language model of 7 billion parameters, with as many of its layers as there is memory for."""
    layer = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)] + [(4096,)] * 2
    outside = [(32000, 4096), (4096,), (32000, 4096)]
    own, others = (sum(map(math.prod, shapes)) for shapes in (layer, outside))
    layers = int((0.6 * free / bytes_per_element - others) // own)
    return layer * max(1, min(32, layers)) + outside


def moved_bytes(count: int, dtype: str, kind: str) -> int:
    """What a step of ours has to read and write."""
    width = 4 if dtype == "float32" else 2
    per_element = 2 * width + width + 16 + (4 if dtype == "bfloat16+16" else 0)
    if kind == "full":
        per_element += 8 + width  # the average, and the gradient once more for the norm
    return count * per_element


def tensors(shapes: Shapes, dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients that stay."""
    generator = torch.Generator("cuda").manual_seed(0)
    made = []
    for shape in shapes:
        param = torch.nn.Parameter(torch.randn(shape, generator=generator, device="cuda", dtype=dtype))
        param.grad = torch.randn(shape, generator=generator, device="cuda", dtype=dtype)
        made.append(param)
    return made


def ours(params: list[torch.nn.Parameter], dtype: str, kind: str) -> Work:
    """A step of ours."""
    options = FULL if kind == "full" else {}
    remainder = dtype == "bfloat16+16"
    optimizer = NAdam(params, lr=1e-3, decoupled_weight_decay=True, remainder=remainder, capturable=True, **options)
    return optimizer.step


def peer(make: Callable[..., torch.optim.Optimizer], **options: Any) -> Callable[..., Work]:
    """A step of one of PyTorch's, as a function of parameters, number format and kind."""

    def made(params: list[torch.nn.Parameter], dtype: str, kind: str) -> Work:
        del dtype
        full = kind == "full"
        optimizer = make(params, lr=1e-3, **options, **({"weight_decay": 0.01} if full else {}))
        if not full:
            return optimizer.step
        averages = [param.detach().clone() for param in params]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(averages, params, 0.01)

        return step

    return made


PEERS = {
    "NAdam foreach": peer(torch.optim.NAdam, foreach=True, decoupled_weight_decay=True),
    "NAdam capturable": peer(torch.optim.NAdam, foreach=True, capturable=True, decoupled_weight_decay=True),
    "AdamW fused": peer(torch.optim.AdamW, fused=True),
}


def seconds(work: Work, repeats: int, calls: int, flush: torch.Tensor | None) -> float:
    """Median seconds of a call."""
    for _ in range(3):
        work()
    found = []
    for _ in range(repeats):
        if flush is not None:
            flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3 / calls)
    return median(found)


def host_seconds(work: Work, repeats: int) -> float:
    """Median seconds until a call returns, whatever the GPU still has to do."""
    found = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return median(found)


def launches(work: Work) -> str:
    """How many kernels a call launches, if the profiler can tell."""
    with suppress(RuntimeError):
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            work()
            torch.cuda.synchronize()
        kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        if kernels:
            return str(sum(not e.name.startswith(("Memcpy", "Memset")) for e in kernels))
    return "?"


def in_graph(work: Work) -> Work:
    """A call as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def units(options: Options) -> list[tuple[str, ...]]:
    """First the check, then cases, number formats and kinds; nothing without a GPU."""
    if not torch.cuda.is_available():
        return []
    return [(CHECK,), *product(options.chosen(list(SIZES), ["ResNet-50"]), DTYPES, KINDS)]


def measure(options: Options, case: str, dtype: str = "", kind: str = "") -> Iterator[Timing]:
    """A row for each of the others, and one for the bytes of a step at the speed of a copy.

    Raises:
        RuntimeError: The GPU does not give what the CPU gives.
    """
    if case == CHECK:
        check()
        return
    shapes = SIZES[case] or billions(torch.cuda.mem_get_info()[0], 24 if kind == "plain" else 32)
    count = sum(map(math.prod, shapes))
    contestants = {OURS: ours} if dtype == "bfloat16+16" else {OURS: ours, **PEERS}
    if count < SMALL:
        contestants["ours, graph"] = ours
    own = math.nan
    for name, make in contestants.items():
        try:
            taken, note = timed(make, shapes, dtype, kind, name.endswith("graph"), options.rounds)
        except torch.OutOfMemoryError:
            continue
        host = f"{options.heading} on {torch.cuda.get_device_name()}"
        if name == OURS:
            own, name = taken, FLOOR
            needed = moved_bytes(count, dtype, kind)
            taken, note = needed / bandwidth(options.rounds), f"{note}, {needed / own / 1e9:.0f} GB/s"
        yield Timing(host, f"{case}, {dtype}", kind, name, own, taken, taken / own, note=note)


def timed(
    make: Callable[..., Work], shapes: Shapes, dtype: str, kind: str, graph: bool, rounds: int
) -> tuple[float, str]:
    """Seconds of a step, and what it asks of the host."""
    small = sum(map(math.prod, shapes)) < SMALL
    work: Work | None = None
    try:
        work = make(tensors(shapes, DTYPES[dtype]), dtype, kind)
        work()
        if graph:
            work = in_graph(work)
        flush = None if small else torch.empty(FLUSHED, dtype=torch.uint8, device="cuda")
        taken = seconds(work, rounds, 20 if small else 1, flush)
        return taken, f"{launches(work)} launches, {duration(host_seconds(work, rounds))} on the host"
    finally:
        work = None
        gc.collect()
        torch.cuda.empty_cache()


def check() -> None:
    """Compare a few steps on the GPU with those on the CPU.

    Raises:
        RuntimeError: They are further apart than rounding takes them.
    """
    for dtype, kind in product(DTYPES, KINDS):
        distance = apart(dtype, kind)
        if not distance <= 8.0:
            raise RuntimeError(f"{dtype}, {kind}: {distance:.2f} units in the last place from the CPU, which is WRONG")


@cache
def bandwidth(repeats: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.ones(LARGE, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), repeats, 1, None)


def apart(dtype: str, kind: str) -> float:
    """After a few steps, the largest distance from the CPU kernel's parameters, in units of the last place of 1."""
    shapes = [(7, 5), (1,), (0, 3), (4099,), (1 << 20,)]
    on_gpu = tensors(shapes, DTYPES[dtype])
    on_cpu = [torch.nn.Parameter(param.detach().cpu()) for param in on_gpu]
    works = ours(on_gpu, dtype, kind), ours(on_cpu, dtype, kind)
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for one, two in zip(on_gpu, on_cpu, strict=True):
            two.grad = torch.randn(two.shape, generator=generator).to(two.dtype)
            one.grad = two.grad.cuda()
        for work in works:
            work()
    pairs = [(a.detach().cpu().double(), b.detach().double()) for a, b in zip(on_gpu, on_cpu, strict=True) if a.numel()]
    unit = torch.finfo(DTYPES[dtype]).eps
    return max(float(((a - b).abs() / (unit * b.abs().clamp(min=1.0))).max()) for a, b in pairs)
