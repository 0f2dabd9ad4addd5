"""Nadam as one would write it in NumPy, a temporary for every operation: a peer, and the yardstick for rounding."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import numpy as np

from nadam.bench.cases import Array


class NumpyNadam:
    """Keras's rule from its documentation; it shares no code with the package.

    Args:
        params: Updated in place.
        compute: Dtype of the arithmetic, the moments and the averages.
        full: Whether to clip by the global norm at 1, decay by 0.01 and keep an average.
    """

    lr, beta1, beta2, eps = 1e-3, 0.9, 0.999, 1e-7
    clipnorm, weight_decay, ema_momentum = 1.0, 0.01, 0.99

    def __init__(self, params: Sequence[Array], compute: Any, full: bool) -> None:
        self.params, self.compute, self.full = params, compute, full
        self.mean = [np.zeros(param.shape, compute) for param in params]
        self.square = [np.zeros(param.shape, compute) for param in params]
        self.averages = [param.astype(compute) for param in params] if full else []
        self.t, self.momentum_product = 0, 1.0

    def _momentum(self, t: int) -> float:
        return self.beta1 * (1 - 0.5 * 0.96**t)

    def step(self, grads: Sequence[Array]) -> None:
        """Update the parameters in place."""
        self.t += 1
        grads = [np.asarray(grad, self.compute) for grad in grads]
        if self.full:
            norm = sqrt(sum(float(np.sum(np.square(grad), dtype=np.float64)) for grad in grads))
            grads = [grad * min(1.0, self.clipnorm / norm) for grad in grads]
        momentum, following = self._momentum(self.t), self._momentum(self.t + 1)
        self.momentum_product *= momentum
        for i, grad in enumerate(grads):
            param = np.asarray(self.params[i], self.compute)
            if self.full:
                param = param - self.lr * self.weight_decay * param
            self.mean[i] = self.mean[i] + (grad - self.mean[i]) * (1 - self.beta1)
            self.square[i] = self.square[i] + (grad * grad - self.square[i]) * (1 - self.beta2)
            ahead = following / (1 - self.momentum_product * following) * self.mean[i]
            ahead = ahead + (1 - momentum) / (1 - self.momentum_product) * grad
            corrected = self.square[i] / (1 - self.beta2**self.t)
            self.params[i][...] = param - self.lr * ahead / (np.sqrt(corrected) + self.eps)
            if self.full:
                average = self.averages[i] * self.ema_momentum
                self.averages[i] = average + (1 - self.ema_momentum) * np.asarray(self.params[i], self.compute)


def rounding_ratio(optimizer: Any, full: bool, seed: int, steps: int = 1000, size: int = 2000) -> float:
    """How much of an optimizer's error is its own.

    Root-mean-square error after float32 steps against a float64 run, over that of a float64 run whose parameters alone
    are rounded to float32 after every step, with the same random float32 gradients.

    Args:
        optimizer: Its ``apply(grads, params)`` updates float32 parameters in place.
        full: Whether it clips, decays and averages as `NumpyNadam` does.
        seed: Of parameters and gradients.
        steps: Number of updates.
        size: Number of parameters.
    """
    rng = np.random.default_rng(seed)
    start = rng.standard_normal(size).astype(np.float32)
    exact, rounded = start.astype(np.float64), start.astype(np.float64)
    exact_run, rounded_run = NumpyNadam([exact], np.float64, full), NumpyNadam([rounded], np.float64, full)
    for _ in range(steps):
        grad = rng.standard_normal(size).astype(np.float32)
        optimizer.apply([grad], [start])
        exact_run.step([grad])
        rounded_run.step([grad])
        rounded[...] = rounded.astype(np.float32)
    own, inevitable = start - exact, rounded - exact
    return float(np.sqrt(np.mean(own**2) / np.mean(inevitable**2)))
