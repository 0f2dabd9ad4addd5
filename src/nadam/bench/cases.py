"""What is timed: lists of shapes, plain or with everything on, in three number formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nadam.numpy import Nadam

Array = NDArray[Any]
Shapes = tuple[tuple[int, ...], ...]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full": {"global_clipnorm": 1.0, "weight_decay": 0.01, "use_ema": True},
}
# Bytes of a parameter or gradient, and of a moment or average, which are float32 for bfloat16 parameters.
WIDTHS = {"float32": (4, 4), "float64": (8, 8), "bfloat16": (2, 4)}


class Case(NamedTuple):
    """One list of tensors; a small one is timed over many steps at a time."""

    shapes: Shapes
    small: bool = False

    @property
    def sizes(self) -> list[int]:
        """Elements of each tensor."""
        return [prod(shape) for shape in self.shapes]


def _resnet50(classes: int) -> Iterator[tuple[int, ...]]:
    """Kernels and normalization scales and shifts of ResNet-50, in its order."""

    def convolution(out: int, into: int, size: int) -> list[tuple[int, ...]]:
        return [(out, into, size, size), (out,), (out,)]

    yield from convolution(64, 3, 7)
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            yield from convolution(width, into, 1)
            yield from convolution(width, width, 3)
            yield from convolution(4 * width, width, 1)
            if block == 0:
                yield from convolution(4 * width, into, 1)
            into = 4 * width
    yield (classes, into)
    yield (classes,)


CASES = {
    "32M": Case(((32 * 2**20,),)),
    "161 tensors": Case(tuple(_resnet50(classes=45))),  # 23.6M parameters
    "300 x 1000": Case(((1000,),) * 300, small=True),
    "4 small": Case(((64, 64), (64,), (64, 10), (10,)), small=True),
}


def bytes_moved(kind: str, dtype: str) -> int:
    """Bytes that a step reads and writes per parameter.

    Plain: reads parameter, gradient and both moments, writes all but the gradient. Full: reads the gradient once more
    for the norm, reads and writes the average.
    """
    stored, computed = WIDTHS[dtype]
    return 3 * stored + 4 * computed + (stored + 2 * computed if kind == "full" else 0)


def as_dtype(name: str) -> np.dtype[Any]:
    """NumPy's dtype of a name; bfloat16 is that of `ml_dtypes`."""
    if name == "bfloat16":
        import ml_dtypes

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    return np.dtype(name)


def random_arrays(shapes: Shapes, dtype: str, seed: int) -> list[Array]:
    """Normal numbers, the same block over and over: drawing 32M of them would take longer than timing them."""
    block = np.random.default_rng(seed).standard_normal(1 << 16).astype(as_dtype(dtype))
    arrays = []
    for shape in shapes:
        flat = np.empty(prod(shape), block.dtype)
        for start in range(0, flat.size, block.size):
            piece = flat[start : start + block.size]
            piece[...] = block[: piece.size]
        arrays.append(flat.reshape(shape))
    return arrays


class Ours:
    """`nadam.Nadam` on a case, after its first step.

    Attributes:
        moved: The arrays that a step goes through, in lists: parameters, gradients, first and second moments, and the
            averages if there are any.
    """

    def __init__(self, case: Case, kind: str, dtype: str) -> None:
        self.params, self.grads = random_arrays(case.shapes, dtype, 0), random_arrays(case.shapes, dtype, 1)
        self.optimizer = Nadam(**KINDS[kind])
        self.optimizer.apply(self.grads, self.params)
        n, state = len(self.params), self.optimizer.variables
        averages, moments = state[2 : -2 * n - 1], state[-2 * n - 1 : -1]
        self.moved: list[Sequence[Array]] = [self.params, self.grads, moments[::2], moments[1::2]]
        if averages:
            self.moved.append(averages)

    def step(self) -> None:
        """One step."""
        self.optimizer.apply(self.grads, self.params)
