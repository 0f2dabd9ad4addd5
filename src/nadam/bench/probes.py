"""What only a fresh process can tell: the memory that a step takes, and how long the first one does.

``python -m nadam.bench.probes`` is the fresh process of the first and prints its figures as JSON.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from statistics import median

from nadam.bench.cases import CASES, KINDS, Array, Ours

FIRST_STEP = """
import numpy as np
import nadam
params = [np.ones(shape, np.float32) for shape in ((64, 64), (64,), (64, 10), (10,))]
nadam.Nadam().apply([np.ones_like(param) for param in params], params)
"""


def first_step_seconds(repeats: int = 5) -> float:
    """Median time of ``python -c`` with one step in it, once the kernels are on disk."""
    seen = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", FIRST_STEP], check=True)
        seen.append(time.perf_counter() - start)
    return median(seen[1:])


def step_memory() -> dict[str, int]:
    """Bytes that a step takes for a while, by the means of finding out; the worst of the kinds."""
    command = [sys.executable, "-m", "nadam.bench.probes"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    figures: dict[str, int] = json.loads(output)
    return figures


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"no {field} in /proc/self/status")


def _growth(step: Callable[[], object]) -> int:
    """How far resident memory rises above its level while a step runs."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists():
        # Without this, a peak from before the step, such as that of the compiler, would hide the step's own.
        reset.write_text("5")
        before = _resident("VmRSS")
        step()
        return _resident("VmHWM") - before
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)


def _traced(step: Callable[[], object]) -> int:
    """Most that Python and NumPy hold at a time, of what a step asks them for."""
    tracemalloc.start()
    try:
        step()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def main() -> None:
    """Print the figures of this process."""
    worst = {"resident": 0, "traced": 0}
    for kind in KINDS:
        ours = Ours(CASES["161 tensors"], kind, "float32")
        fresh = [grad.copy() for grad in ours.grads]

        def step(ours: Ours = ours, fresh: list[Array] = fresh) -> None:
            """With other gradient arrays than the step before."""
            ours.grads, fresh[:] = list(fresh), ours.grads
            ours.step()

        for _ in range(3):
            step()
        gc.collect()
        for name, look in (("resident", _growth), ("traced", _traced)):
            worst[name] = max(worst[name], *(look(step) for _ in range(3)))
    print(json.dumps(worst))


if __name__ == "__main__":
    main()
