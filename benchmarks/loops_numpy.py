"""Time `apply()` of NumPy's optimizers inside a training loop: forward and backward between the steps, in turns.

    python -m benchmarks.loops_numpy
    python -m benchmarks.loops_numpy --model "MLP, 0.27M"

The matrix products leave the threads of NumPy's BLAS awake. "Full" is global-norm clipping, decoupled decay and a
moving average. The floor moves the same bytes at the same place, on the same threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

import nadam
from benchmarks.cases import Array
from benchmarks.floor import floor_step
from benchmarks.loops import DENSE, Sample, full_settings, report
from benchmarks.reference import NumpyNadam


def network(units: Sequence[int]) -> list[Array]:
    """Kernels, then biases."""
    rng = np.random.default_rng(0)
    kernels = [(rng.standard_normal(shape) * (2 / shape[0]) ** 0.5).astype(np.float32) for shape in pairwise(units)]
    return kernels + [np.zeros(size, np.float32) for size in units[1:]]


def gradients(params: list[Array], given: Array) -> list[Array]:
    """Of the mean square of 1 less what a network with rectified linear units gives."""
    count = len(params) // 2
    inputs, values = [], given
    for kernel, bias in zip(params[:count], params[count:], strict=True):
        inputs.append(values)
        values = np.maximum(values @ kernel + bias, 0) if len(inputs) < count else values @ kernel + bias
    slope, kernels, biases = (values - 1) * np.float32(2 / values.size), [], []
    for kernel, value in zip(params[:count][::-1], inputs[::-1], strict=True):
        kernels.append(value.T @ slope)
        biases.append(slope.sum(0))
        slope = (slope @ kernel.T) * (value != 0)
    return kernels[::-1] + biases[::-1]


def loops(name: str, kind: str) -> dict[str, Sample]:
    """A sample of each, on a network of its own."""
    units, batch = DENSE[name]
    given = np.random.default_rng(1).standard_normal((batch, units[0])).astype(np.float32)

    def loop(step_of: Callable[[list[Array]], Callable[[list[Array]], Any]]) -> Sample:
        params = network(units)
        step = step_of(params)

        def sample() -> float:
            grads = gradients(params, given)
            begin = time.perf_counter()
            step(grads)
            return time.perf_counter() - begin

        return sample

    def ours(params: list[Array]) -> Callable[[list[Array]], Any]:
        optimizer = nadam.Nadam(1e-4, **(full_settings() if kind == "full" else {}))
        optimizer.build(params)
        return optimizer.apply

    return {
        "ours": loop(ours),
        "NumPy": loop(lambda params: NumpyNadam(params, np.float32, kind == "full").step),
        "floor": loop(lambda params: floor_step(params, kind)),
    }


if __name__ == "__main__":
    report("loops_numpy", __doc__.splitlines()[0], loops, {}, models=list(DENSE))
