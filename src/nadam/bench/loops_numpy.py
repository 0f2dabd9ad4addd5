"""Time `apply()` of NumPy's optimizers inside a training loop: forward and backward between the steps, in turns.

The matrix products leave the threads of NumPy's BLAS awake. "Full" is global-norm clipping, decoupled decay and a
moving average, "8 bits" ours with moments of 8 bits. The floor moves the same bytes at the same place, on the same
threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from nadam.bench.cases import Array
from nadam.bench.loops import BIG, DENSE, FLOAT32, MLP, Sample, floor_step, full_settings
from nadam.bench.records import COMPRESSED, FLOOR, OURS
from nadam.bench.reference import NumpyNadam
from nadam.numpy import Nadam

MODELS, LESS = tuple(DENSE), None
QUICK_MODELS = (MLP,)
COMPRESSED_MODELS = (BIG,)
WANTED = {(BIG, COMPRESSED): {FLOAT32: 1.3}}


def network(name: str) -> list[Array]:
    """Kernels, then biases."""
    rng, (units, _) = np.random.default_rng(0), DENSE[name]
    kernels = [(rng.standard_normal(shape) * (2 / shape[0]) ** 0.5).astype(np.float32) for shape in pairwise(units)]
    return kernels + [np.zeros(size, np.float32) for size in units[1:]]


def inputs(name: str) -> Array:
    """One batch."""
    units, batch = DENSE[name]
    return np.random.default_rng(1).standard_normal((batch, units[0])).astype(np.float32)


def gradients(params: list[Array], given: Array) -> list[Array]:
    """Of the mean square of 1 less what a network with rectified linear units gives."""
    count = len(params) // 2
    entering, values = [], given
    for kernel, bias in zip(params[:count], params[count:], strict=True):
        entering.append(values)
        values = np.maximum(values @ kernel + bias, 0) if len(entering) < count else values @ kernel + bias
    slope, kernels, biases = (values - 1) * np.float32(2 / values.size), [], []
    for kernel, value in zip(params[:count][::-1], entering[::-1], strict=True):
        kernels.append(value.T @ slope)
        biases.append(slope.sum(0))
        slope = (slope @ kernel.T) * (value != 0)
    return kernels[::-1] + biases[::-1]


def loops(name: str, kind: str, quick: bool = False) -> dict[str, Sample]:
    """A sample of each, on a network of its own."""
    given = inputs(name)

    def loop(step_of: Callable[[list[Array]], Callable[[list[Array]], Any]]) -> Sample:
        params = network(name)
        step = step_of(params)

        def sample() -> float:
            grads = gradients(params, given)
            begin = time.perf_counter()
            step(grads)
            return time.perf_counter() - begin

        return sample

    def ours(params: list[Array], **settings: Any) -> Callable[[list[Array]], Any]:
        optimizer = Nadam(1e-4, **settings, **(full_settings() if kind == "full" else {}))
        optimizer.build(params)
        return optimizer.apply

    if kind == COMPRESSED:
        return {OURS: loop(partial(ours, state_bits=8)), FLOAT32: loop(ours)}
    return {
        OURS: loop(ours),
        "NumPy": loop(lambda params: NumpyNadam(params, np.float32, kind == "full").step),
        FLOOR: loop(lambda params: floor_step(params, kind)),
    }
