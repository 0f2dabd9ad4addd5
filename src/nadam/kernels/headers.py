"""Where NumPy arrays lie: the kernel that reads many array headers in one call, compiled by Numba.

A step needs the address of every gradient, which may be a new array each time. Asking NumPy costs half a microsecond an
array, as much as the update of a thousand numbers; reading the C struct behind it (PyArrayObject_fields, part of
NumPy's stable C interface) costs nothing. `layouts.py` checks, once, that the struct is where this kernel takes it to
be.
"""

from typing import Any

from numba import int64, njit, types

from nadam.kernels.layouts import (
    ALIGNMENT,
    ARRAYS,
    DATA,
    DESCRIPTOR,
    DIMENSIONS,
    EXPECTED,
    FLAGS,
    HIGH,
    HIGHS,
    LOW,
    LOWS,
    MISMATCH,
    NDIM,
    NUM_RANGES,
    NUM_TENSORS,
    SHAPE,
    STRIDES,
    STRUCT_FLAGS,
    STRUCT_NDIM,
    TABLE,
    TYPE,
)
from nadam.kernels.memory import integers, pointer_to
from nadam.kernels.spans import COLUMNS, GRAD, PARAM

small_integers = pointer_to(types.int32)


def refresh() -> Any:
    """The kernel that writes the addresses of arrays into a table, up to the first that is not as expected."""

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b = integers(block)
        arrays, expected, table = integers(b[ARRAYS]), integers(b[EXPECTED]), integers(b[TABLE])
        lows, highs = integers(b[LOWS]), integers(b[HIGHS])
        n = b[NUM_TENSORS]
        for t in range(2 * n):  # parameters, then gradients
            b[MISMATCH] = t
            is_grad = t >= n
            header, wanted = integers(arrays[t]), integers(expected[t])
            ndim = int64(small_integers(arrays[t] + 8 * STRUCT_NDIM)[0])
            flags = int64(small_integers(arrays[t] + 8 * STRUCT_FLAGS)[0])
            address = header[DATA]
            if header[DESCRIPTOR] != wanted[TYPE] or ndim != wanted[NDIM]:
                return
            if (flags & wanted[FLAGS]) != wanted[FLAGS] or (address & (wanted[ALIGNMENT] - 1)) != 0:
                return
            sizes, strides = integers(header[DIMENSIONS]), integers(header[STRIDES])
            for d in range(ndim):
                if sizes[d] != wanted[SHAPE + d] or strides[d] != wanted[SHAPE + ndim + d]:
                    return
            # The last range that begins before this array's end: does it, or one before it, reach into the array?
            low, high = int64(0), b[NUM_RANGES] if is_grad else int64(0)
            while low < high:
                middle = (low + high) // 2
                if lows[middle] < address + wanted[HIGH]:
                    low = middle + 1
                else:
                    high = middle
            if low > 0 and highs[low - 1] > address + wanted[LOW]:
                return
            table[(t - n) * COLUMNS + GRAD if is_grad else t * COLUMNS + PARAM] = address
        b[MISMATCH] = -1

    return kernel
