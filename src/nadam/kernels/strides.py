"""How arrays lie in memory: what the kernels are told of it, and which arrays share it."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

DENSE = np.array([-1])
# Large arrays begin at the same place of a memory page and, of equal size, lie at equal distances: reading all of them
# at once then means the same few banks of memory in turn, up to twice as slow. State that is shifted by this does not.
LARGE, SHIFT = 1 << 22, (1 << 16) + 64


def address(array: Array) -> int:
    """Where an array's first element lies."""
    return int(array.__array_interface__["data"][0])


def axis_order(state: Array) -> list[int]:
    """The axes of an array that is dense in memory, outermost first.

    Example:
        >>> axis_order(np.zeros((2, 3), order="F"))
        [1, 0]
    """
    return sorted(range(state.ndim), key=lambda axis: -state.strides[axis])


def layout(array: Array, order: Sequence[int]) -> NDArray[np.int64]:
    """How an array lies when its axes are taken in an order: dimensions, sizes, strides in bytes; -1 where it is dense.

    A complex array is one of reals with one more axis, of size 2.

    Example:
        >>> layout(np.zeros((2, 3)), [0, 1]).tolist(), layout(np.zeros((2, 3))[:, ::2], [0, 1]).tolist()
        ([-1], [2, 2, 2, 24, 16])
    """
    sizes, strides = [array.shape[axis] for axis in order], [array.strides[axis] for axis in order]
    width = array.itemsize
    if array.dtype.kind == "c":
        width //= 2
        sizes, strides = [*sizes, 2], [*strides, width]
    step, dense = width, address(array) % width == 0
    for size, stride in zip(reversed(sizes), reversed(strides), strict=True):
        dense = dense and (size == 1 or stride == step)
        step *= size
    return DENSE if dense else np.array([len(sizes), *sizes, *strides], np.int64)


def bounds(array: Array) -> tuple[int, int]:
    """The addresses of an array's first byte and of the one after its last.

    Example:
        >>> a = np.zeros(4, np.float32)
        >>> low, high = bounds(a[::-1])
        >>> high - low
        16
    """
    low = high = address(array)
    if array.size == 0:
        return low, low
    for size, stride in zip(array.shape, array.strides, strict=True):
        low, high = low + min(0, (size - 1) * stride), high + max(0, (size - 1) * stride)
    return low, high + array.itemsize


def overlaps_itself(array: Array) -> bool:
    """Whether two elements of an array share memory, as in one that was expanded.

    Example:
        >>> overlaps_itself(np.broadcast_to(np.zeros(1), (3,))), overlaps_itself(np.zeros((4, 4))[::2, ::3])
        (True, False)
    """
    return overlap(array.shape, array.strides, array.itemsize)


def overlap(shape: Sequence[int], strides: Sequence[int], width: int) -> bool:
    """Whether two elements of such a shape, so many bytes wide and with strides in bytes, share memory."""
    reach = width
    for stride, size in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if stride < reach:
            break
        reach += stride * (size - 1)
    else:
        return False
    offsets = np.zeros((), np.int64)
    for stride, size in zip(strides, shape, strict=True):
        offsets = offsets[..., None] + np.arange(size) * stride
    distances = np.diff(np.sort(offsets, axis=None))
    return bool((distances < width).any())


def overlapping(written: Sequence[Array], read: Sequence[Array] = ()) -> tuple[int, int] | None:
    """Two arrays of which a step writes to at least one, and that share memory; None where there are none.

    Exact: arrays that are interleaved, as the halves of the rows of a matrix, do not share any.

    Example:
        >>> a = np.zeros((4, 4))
        >>> overlapping([a[:, :2], a[:, 2:]]), overlapping([a[:2]], [a[2:], a[1:]])
        (None, (0, 2))
    """
    arrays = [*written, *read]
    ranges = sorted((*bounds(array), i) for i, array in enumerate(arrays) if array.size)
    before: list[tuple[int, int]] = []  # those that have not ended yet
    for low, high, i in ranges:
        before = [(end, j) for end, j in before if end > low]
        for _, j in before:
            if min(i, j) < len(written) and np.shares_memory(arrays[i], arrays[j]):
                return min(i, j), max(i, j)
        before.append((high, i))
    return None
