"""Print what is installed, which kernel each host uses here, threads and cache: the text for a bug report."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import distributions
from importlib.util import find_spec
from time import perf_counter
from typing import Any

from nadam.bench import machine
from nadam.bench.loops import MLP, TRANSFORMER, in_loops
from nadam.bench.measure import ratio
from nadam.bench.records import OURS, duration
from nadam.kernels.cpu import disk
from nadam.kernels.cpu.threads import get_num_threads
from nadam.kernels.gpu import OLDEST_TRITON

SETTINGS = ("NADAM_CACHE_DIR", "NUMBA_NUM_THREADS", "NUMBA_DISABLE_JIT", "OMP_NUM_THREADS", "KERAS_BACKEND")
CPU = "the compiled pass"
ON_TORCH = {"on PyTorch's tensors": "as many as PyTorch computes on; torch.set_num_threads() sets them"}
SECONDS = 2.0  # of the comparison


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `nadam info`."""
    parser.add_argument("--json", action="store_true", help="as JSON")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    found = collect()
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    for title, values in found.items():
        print(title)
        for name, value in values.items():
            print(f"  {name:20} {value}")
    return 0


def collect() -> dict[str, dict[str, Any]]:
    """All of it, without importing a framework."""
    versions = machine.versions()
    absent = {name: "not installed" for name in machine.PACKAGES if name not in versions}
    settings = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    return {
        "versions": versions | absent,
        "machine": machine.machine(),
        "kernels": kernels(versions),
        "threads": {"of a pass": get_num_threads()} | (ON_TORCH if "torch" in versions else {}),
        "cache": cache(),
        "environment": settings or {"set": "nothing that nadam reads"},
    }


def cache() -> dict[str, Any]:
    """Where compiled kernels are kept, and whether they are."""
    folder = disk.directory()
    reason = disk.unusable(folder)
    state = "usable" if reason is None else f"not used: {reason}, so every process compiles anew"
    return {"folder": str(folder), "state": state, "kernels": len(list(folder.glob("*.kernel")))}


def kernels(versions: dict[str, str]) -> dict[str, str]:
    """What does a step on each host here, and why nothing faster."""
    found = {"NumPy": f"CPU: {CPU}, on threads of its own"}
    if "torch" in versions:
        own = "on PyTorch's threads" if sys.platform == "linux" else "on threads of its own"
        found["PyTorch"] = f"CPU: {CPU}, {own}; GPU: {_on_gpu(versions)}"
    if "jax" in versions:
        found["JAX"] = f"nadam, nadamw: XLA's own loops; fused: {_in_jax()}"
    if "keras" in versions:
        for backend, how in (
            ("torch", found.get("PyTorch")),
            ("jax", _in_jax()),
            ("tensorflow", "XLA's loops"),
        ):
            if backend in versions:
                found[f"Keras on {backend}"] = str(how)
    return found


def _on_gpu(versions: dict[str, str]) -> str:
    if not machine.gpus():
        return "none found"
    if versions["torch"].endswith("+cpu"):
        return "this build of PyTorch has no support for it"
    triton = versions.get("triton")
    if triton is None or tuple(int(n) for n in triton.split(".")[:2]) < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"PyTorch's foreach operations, since Triton is {triton or 'missing'} and not {oldest} or newer"
    return "Triton's kernels"


def _in_jax() -> str:
    plugins = [name for each in distributions() if (name := each.name or "").startswith(("jax-cuda", "jax-rocm"))]
    if plugins:
        return f"XLA's own loops, since {plugins[0]} is installed"
    return f"{CPU}, called by XLA's programs, as long as the CPU is the only device"


def glance() -> int:
    """Compare ours with a stock Nadam in a training loop, for two seconds."""
    if find_spec("torch") is not None:
        from nadam.bench import loops_torch as module

        name, others = TRANSFORMER, {"NAdam": "torch.optim.NAdam", "fused Adam": "fused Adam"}
    else:
        from nadam.bench import loops_numpy as module  # type: ignore[no-redef]

        name, others = MLP, {"NumPy": "Nadam written in NumPy"}
    samples = {who: loop for who, loop in module.loops(name, "plain").items() if who in (OURS, *others)}
    begin = perf_counter()
    seen = in_loops(samples, 1000, steps=2, warm_up=1, budget=SECONDS)
    print(f"\none step in a training loop, {name}, {perf_counter() - begin:.1f} s of it")
    own = sorted(seen[OURS])[len(seen[OURS]) // 2]
    print(f"  {'nadam':22} {duration(own)}")
    for who, label in others.items():
        print(f"  {label:22} {duration(sorted(seen[who])[len(seen[who]) // 2])}, {ratio(seen[who], seen[OURS]):.2f}x")
    print('all of it: nadam bench --quick, after pip install "nadam[bench]"')
    return 0
