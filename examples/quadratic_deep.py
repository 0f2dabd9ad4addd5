"""DeepOBS's quadratic_deep, a noisy quadratic of 100 parameters, and what was published of TensorFlow 1's Nadam on it.

Schmidt, Schneider and Hennig (2021), "Descending through a Crowded Valley": lr 1e-3, seed 42, 100 epochs of 7 batches
of 128. Theirs are the mean losses of the test set. The order in which they shuffled is not known.
"""

from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SIZE, BATCH, BATCHES = 100, 128, 7
SETTINGS = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7}
PUBLISHED = {0: 353.446764, 1: 342.6978, 100: 106.5976}


def rotation(rng: np.random.RandomState) -> Array:
    """Draw a rotation by the subgroup algorithm of Diaconis and Shahshahani (1987)."""
    turn = 2 * np.pi * rng.uniform()
    rotated = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    for size in range(3, SIZE + 1):
        axis = rng.normal(size=size)
        axis = np.eye(size)[0] - axis / np.linalg.norm(axis)
        axis /= np.linalg.norm(axis)
        larger = np.eye(size)
        larger[1:, 1:] = rotated
        rotated = larger - 2 * np.outer(axis, axis @ larger)
    return -rotated


@cache
def problem() -> tuple[Array, Array, Array]:
    """The matrix, and rows to train on and to test with."""
    rng = np.random.RandomState(42)
    eigenvalues = np.concatenate([rng.uniform(0, 1, 90), rng.uniform(30, 60, 10)])
    rotated = rotation(rng)
    train, test = (np.random.RandomState(seed).normal(0, 0.6, (1000, SIZE)) for seed in (42, 43))
    return rotated.T @ np.diag(eigenvalues) @ rotated, train, test[: BATCHES * BATCH]


def loss(param: Array) -> float:
    matrix, _, test = problem()
    return float(np.mean(np.sum((param - test) @ matrix * (param - test), axis=1)) / 2)


def losses(step: Callable[[Array, Array], Array], epochs: int, order: int = 0) -> Iterator[float]:
    """Yield the loss before the first and after each epoch, on the training rows in one of their orders."""
    matrix, train, _ = problem()
    train = train[np.random.default_rng(order).permutation(len(train))]
    param = np.ones(SIZE)
    yield loss(param)
    for _ in range(epochs):
        for begin in range(0, BATCHES * BATCH, BATCH):
            grad = matrix @ (param - train[begin : begin + BATCH].mean(axis=0))
            param = np.array(step(param.copy(), grad), np.float64)
        yield loss(param)
