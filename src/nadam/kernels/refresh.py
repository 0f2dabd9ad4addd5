"""Where arrays lie: the kernels that look at many arrays in one call, compiled by Numba.

A step needs the address of every gradient, which may be a new array each time. Asking from Python costs half a
microsecond an array, as much as the update of a thousand numbers. NumPy's arrays tell by the C struct behind them
(PyArrayObject_fields, part of its stable C interface), which `layouts.py` checks, once, to be where it is read here;
PyTorch's tensors by the function that it publishes for this, of DLPack's exchange interface.
"""

from typing import Any

from llvmlite import ir
from numba import int64, njit, types
from numba.extending import intrinsic

from nadam.kernels.layouts import (
    ALIGNMENT,
    ARRAYS,
    DATA,
    DESCRIPTOR,
    DIMENSIONS,
    EXPECTED,
    FLAGS,
    FUNCTION,
    HIGH,
    HIGHS,
    LIST,
    LIST_ITEMS,
    LOW,
    LOWS,
    MEMBERS,
    MISMATCH,
    NDIM,
    NUM_RANGES,
    NUM_TENSORS,
    OBJECT_TYPE,
    ONE_TYPE,
    OTHER_TYPE,
    SHAPE,
    STRIDES,
    STRUCT_FLAGS,
    STRUCT_NDIM,
    TABLE,
    TYPE,
    VIEW,
)
from nadam.kernels.memory import integers, pointer_to
from nadam.kernels.spans import COLUMNS, GRAD, PARAM

small_integers = pointer_to(types.int32)
# Words of a DLTensor: address; device; dimensions and dtype together; addresses of sizes and strides; byte offset.
DL_DATA, DL_DEVICE, DL_KIND, DL_SIZES, DL_STRIDES, DL_OFFSET = range(6)


@intrinsic
def describe(typing: Any, function: Any, tensor: Any, view: Any) -> Any:
    """Call DLPack's function that writes a DLTensor; gives 0, or else a Python exception is set."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, result = ir.IntType(64), ir.IntType(32)
        target = builder.inttoptr(args[0], ir.PointerType(ir.FunctionType(result, [word, word])))
        return builder.call(target, [args[1], args[2]])

    return types.int32(types.int64, types.int64, types.int64), build


@njit(inline="always")
def numpy_array(array, b):
    """(type, dimensions, flags, address, where the sizes are, where the strides are) of an array."""
    header = integers(array)
    ndim = int64(small_integers(array + 8 * STRUCT_NDIM)[0])
    flags = int64(small_integers(array + 8 * STRUCT_FLAGS)[0])
    return header[DESCRIPTOR], ndim, flags, header[DATA], header[DIMENSIONS], header[STRIDES]


@njit(inline="always")
def torch_tensor(tensor, b):
    """The same of a tensor: its type is dtype and dimensions in one word, its flags are the device."""
    if describe(b[FUNCTION], tensor, b[VIEW]) != 0:
        return int64(-1), int64(0), int64(0), int64(0), int64(0), int64(0)
    view = integers(b[VIEW])
    ndim = int64(small_integers(b[VIEW] + 8 * DL_KIND)[0])
    return view[DL_KIND], ndim, view[DL_DEVICE], view[DL_DATA] + view[DL_OFFSET], view[DL_SIZES], view[DL_STRIDES]


@njit(error_model="numpy", _nrt=False)
def taken_from_list(b):
    """The place of the first gradient of another type than expected, or -1; those before it are at hand then."""
    items, members = integers(integers(b[LIST])[LIST_ITEMS]), integers(b[MEMBERS])
    n = b[NUM_TENSORS]
    grads = integers(b[ARRAYS] + 8 * n)
    for t in range(n):
        grad = items[members[t]]
        kind = integers(grad)[OBJECT_TYPE]
        if kind != b[ONE_TYPE] and kind != b[OTHER_TYPE]:
            return n + t
        grads[t] = grad
    return int64(-1)


def refresh(source: str) -> Any:
    """The kernel that writes the addresses of arrays into a table, up to the first that is not as expected.

    Args:
        source: "numpy_array", or "torch_tensor" for gradients in a list; the latter is called with the GIL held.
    """
    look, listed = globals()[source], source == "torch_tensor"

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b = integers(block)
        arrays, expected, table = integers(b[ARRAYS]), integers(b[EXPECTED]), integers(b[TABLE])
        lows, highs = integers(b[LOWS]), integers(b[HIGHS])
        n = b[NUM_TENSORS]
        if listed:
            b[MISMATCH] = taken_from_list(b)
            if b[MISMATCH] >= 0:
                return
        for t in range(2 * n):  # parameters, then gradients
            b[MISMATCH] = t
            is_grad = t >= n
            wanted = integers(expected[t])
            kind, ndim, flags, address, where_sizes, where_strides = look(arrays[t], b)
            if kind != wanted[TYPE] or ndim != wanted[NDIM]:
                return
            if listed and flags != wanted[FLAGS]:
                return
            if (flags & wanted[FLAGS]) != wanted[FLAGS] or (address & (wanted[ALIGNMENT] - 1)) != 0:
                return
            sizes, strides = integers(where_sizes), integers(where_strides)
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
            if is_grad:
                table[(t - n) * COLUMNS + GRAD] = address
            elif table[t * COLUMNS + PARAM] != address:  # its memory was exchanged
                return
        b[MISMATCH] = -1

    return kernel
