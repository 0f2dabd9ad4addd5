"""How arrays lie in memory, told to the kernels; and a quick look whether they still lie so."""

import ctypes
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nadam.kernels import native
from nadam.kernels.table import address

Array = NDArray[Any]

# Words of the C struct of an array (PyArrayObject_fields), after the two that begin every Python object.
DATA, STRUCT_NDIM, DIMENSIONS, STRIDES, DESCRIPTOR, STRUCT_FLAGS = 2, 3, 4, 5, 7, 8
# What is expected of an array: type object, dimensions, flags that are set (of a tensor: its device), alignment, its
# first and last byte's place from its address; then sizes and strides.
TYPE, NDIM, FLAGS, ALIGNMENT, LOW, HIGH, SHAPE = range(7)
WRITEABLE = 0x0400
# Arguments of the kernel in headers.py.
ARRAYS, EXPECTED, TABLE, LOWS, HIGHS, NUM_TENSORS, NUM_RANGES, MISMATCH, FUNCTION, VIEW = range(10)
# And where gradients are given as a list: the list, which of it are wanted, the two types that they may have.
LIST, MEMBERS, ONE_TYPE, OTHER_TYPE = range(10, 14)
# Words of every Python object, and of a list.
OBJECT_TYPE, LIST_ITEMS = 1, 3

DENSE = np.array([-1])


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
    """The same of elements so many bytes wide, with strides in bytes."""
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


class Headers:
    """A quick check that parameters and gradients lie as they did, and their addresses.

    Args:
        kernel: Of headers.py.
        params: Parameters.
        expected: What the kernel is to find: of each parameter, then of each gradient.
        table: Rows of the kernels' table of tensors, whose addresses are kept up to date.
        written: First and last address of all that the step writes to; no gradient may overlap it.
        function: Address of the function that describes an array, where the kernel takes one.
        types: The two types that gradients may have, where they are given as a list.
        members: Which of such a list are these.
    """

    def __init__(
        self,
        kernel: Callable[[int, int], None],
        params: Sequence[Any],
        expected: Sequence[NDArray[np.int64]],
        table: NDArray[np.int64],
        written: Sequence[tuple[int, int]],
        function: int = 0,
        types: tuple[type, type] = (object, object),
        members: NDArray[np.int64] | None = None,
    ) -> None:
        self._members = np.arange(len(params), dtype=np.int64) if members is None else members
        self._expected, self._table = expected, table
        self._pointers = np.array([address(wanted) for wanted in expected], np.int64)
        ranges = sorted(written)
        self._lows = np.array([low for low, _ in ranges], np.int64)
        self._highs = np.maximum.accumulate(np.array([high for _, high in ranges], np.int64))
        self._params = params  # held, so that their identities stay theirs
        self._arrays = np.zeros(2 * len(params), np.int64)
        self._arrays[: len(params)] = list(map(id, params))
        self._grads = self._arrays[len(params) :]
        self._view = np.zeros(6, np.int64)
        addresses = [address(array) for array in (self._arrays, self._pointers, table, self._lows, self._highs)]
        where = (function, address(self._view), 0, address(self._members), *map(id, types))
        self._block = np.array([*addresses, len(params), len(ranges), -1, *where], np.int64)
        self._address, self._words = address(self._block), self._block.data
        self._kernel = kernel

    def refresh(self, identities: NDArray[np.int64]) -> bool:
        """Put the addresses of the gradients that have these identities into the table.

        Returns:
            Whether they, and the parameters, lie as expected; if not, the table is not to be used.
        """
        self._grads[:] = identities
        self._kernel(self._address, 0)
        return self._words[MISMATCH] < 0

    def refresh_from(self, grads: list[Any]) -> bool:
        """The same for a list of them, from which the kernel takes its own; it looks at their types too."""
        self._words[LIST] = id(grads)
        self._kernel(self._address, 0)
        return self._words[MISMATCH] < 0


def array_headers(
    params: Sequence[Array], grads: Sequence[Array], table: NDArray[np.int64], written: Sequence[Array]
) -> Headers:
    """Of NumPy arrays: parameters, gradients as those to come will lie, and all that the step writes to."""
    expected = [_expected(array, WRITEABLE) for array in params] + [_expected(array, 0) for array in grads]
    kernel = native.kernel("headers", "refresh", "numpy_array")
    return Headers(kernel, params, expected, table, [bounds(array) for array in written])


def _expected(array: Array, flags: int) -> NDArray[np.int64]:
    return expectation(array, id(array.dtype), flags, array.strides)


def expectation(array: Array, kind: int, flags: int, strides: Sequence[int]) -> NDArray[np.int64]:
    """What a kernel is to find where it finds an array over this memory: its kind, and strides in whatever units."""
    width = array.itemsize // 2 if array.dtype.kind == "c" else array.itemsize
    alignment = width if address(array) % width == 0 else 1
    low, high = (bound - address(array) for bound in bounds(array))
    return np.array([kind, array.ndim, flags, alignment, low, high, *array.shape, *strides], np.int64)


@cache
def headers_readable() -> bool:
    """Whether this interpreter and this NumPy keep an array's header where headers.py reads it."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    array = np.zeros((3, 5), np.float32)[:, 1::2]
    words = (ctypes.c_int64 * 9).from_address(id(array))
    ndim = ctypes.c_int32.from_address(id(array) + 8 * STRUCT_NDIM).value
    flags = ctypes.c_int32.from_address(id(array) + 8 * STRUCT_FLAGS).value
    if (words[DATA], ndim, words[DESCRIPTOR]) != (address(array), 2, id(array.dtype)) or not flags & WRITEABLE:
        return False
    array.flags.writeable = False
    flags = ctypes.c_int32.from_address(id(array) + 8 * STRUCT_FLAGS).value
    sizes, strides = ((ctypes.c_int64 * 2).from_address(words[word]) for word in (DIMENSIONS, STRIDES))
    return not flags & WRITEABLE and (tuple(sizes), tuple(strides)) == (array.shape, array.strides)


@cache
def lists_readable() -> bool:
    """Whether this interpreter keeps a list's items and an object's type where headers.py reads them."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    items = [np.zeros(1), 2.0, "three"]
    words = (ctypes.c_int64 * (LIST_ITEMS + 1)).from_address(id(items))
    if words[OBJECT_TYPE] != id(list) or words[LIST_ITEMS - 1] != len(items):  # the word before is their number
        return False
    found = list((ctypes.c_int64 * len(items)).from_address(words[LIST_ITEMS]))
    if found != list(map(id, items)):
        return False
    kinds = [ctypes.c_int64.from_address(item + 8 * OBJECT_TYPE).value for item in found]
    return kinds == [id(type(item)) for item in items]
