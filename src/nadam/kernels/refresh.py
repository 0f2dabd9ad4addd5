"""The kernel behind `pointers.Pointers`, compiled by Numba: it looks at all that a step is given, in one call."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float64, int64, njit, types
from numba.extending import intrinsic

from nadam.core.clock import CALLS, MOMENTUM_PRODUCT, SEEN
from nadam.kernels.memory import doubles, integers, pointer_to
from nadam.kernels.pointers import (
    ALIGNMENT,
    CELLS,
    CLOCKS,
    DATA,
    DESCRIPTOR,
    DICT_NEXT,
    DICTS,
    DIMENSIONS,
    DTYPE,
    DTYPE_MASK,
    FITS,
    FLAGS,
    HIGH,
    HIGHS,
    IMPL,
    INLINE,
    KEYS,
    LIST,
    LIST_ITEM,
    LIST_SIZE,
    LISTS,
    LOW,
    LOWS,
    NDIM,
    NUM_CLOCKS,
    NUM_DICTS,
    NUM_FIXED,
    NUM_GRADS,
    NUM_LISTS,
    NUM_RANGES,
    OBJECT_TYPE,
    OBJECTS,
    OFFSET,
    POSITION,
    PYTHON_TYPE,
    SCRATCH,
    SHAPE,
    SHIFT,
    SIZES,
    START,
    STORAGE,
    STORAGE_DATA,
    STRIDES,
    STRUCT_FLAGS,
    STRUCT_NDIM,
    TYPE,
    WANTED,
    WORDS,
)

small_integers = pointer_to(types.int32)


def c_function(result: Any, arguments: int) -> Callable[..., Any]:
    """A call of a C function by its address, which takes so many words."""

    @intrinsic
    def call(typing: Any, function: Any, words: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            word = ir.IntType(64)
            kind = ir.FunctionType(ir.IntType(result.bitwidth), [word] * arguments)
            given = [builder.extract_value(args[1], i) for i in range(arguments)]
            return builder.call(builder.inttoptr(args[0], ir.PointerType(kind)), given)

        return result(types.int64, types.UniTuple(types.int64, arguments)), build

    return call  # type: ignore[no-any-return]


list_size, list_item, dict_next = c_function(types.int64, 1), c_function(types.int64, 2), c_function(types.int32, 4)


@njit(inline="always")
def numpy_array(array, wanted, words):
    """The address of an array's memory; -1 if it does not lie as wanted."""
    header = integers(array)
    flags, ndim = small_integers(array + 8 * STRUCT_FLAGS)[0], small_integers(array + 8 * STRUCT_NDIM)[0]
    if header[DESCRIPTOR] != wanted[TYPE] or ndim != wanted[NDIM] or (flags & wanted[FLAGS]) != wanted[FLAGS]:
        return int64(-1)
    sizes, strides = integers(header[DIMENSIONS]), integers(header[STRIDES])
    for d in range(ndim):
        if sizes[d] != wanted[SHAPE + d] or strides[d] != wanted[SHAPE + ndim + d]:
            return int64(-1)
    return header[DATA]


@njit(inline="always")
def torch_tensor(tensor, wanted, words):
    """The same of a tensor, whose flags are PyTorch's dispatch keys: sparse, negative, conjugate and so on."""
    impl = integers(integers(tensor)[words[IMPL]])
    geometry = words[SIZES]
    if impl[geometry + DTYPE] & DTYPE_MASK != wanted[TYPE] or impl[geometry + KEYS] != wanted[FLAGS]:
        return int64(-1)
    ndim, storage = impl[geometry], impl[words[STORAGE]]
    if ndim != wanted[NDIM] or impl[geometry + OFFSET] != wanted[START] or storage == 0:
        return int64(-1)
    for d in range(ndim):
        if ndim <= INLINE:
            size, stride = impl[geometry + 1 + d], impl[geometry + 1 + INLINE + d]
        else:
            size, stride = integers(impl[geometry + 1])[d], integers(impl[geometry + 1])[ndim + d]
        if size != wanted[SHAPE + d] or stride != wanted[SHAPE + ndim + d]:
            return int64(-1)
    return integers(storage)[words[STORAGE_DATA]] + wanted[SHIFT]


@njit(error_model="numpy", _nrt=False)
def same_members(b):
    """Whether dicts and lists hold the objects that they held. A dict may hold others as well."""
    at, scratch = b[DICTS], integers(b[SCRATCH])
    for _ in range(b[NUM_DICTS]):
        held = integers(at)
        found, count, scratch[0] = int64(0), held[1], 0
        while found < count and dict_next(b[DICT_NEXT], (held[0], b[SCRATCH], b[SCRATCH] + 8, b[SCRATCH] + 16)) != 0:
            if scratch[1] == held[2 + 2 * found]:
                if scratch[2] != held[3 + 2 * found]:
                    return False
                found += 1
        if found != count:
            return False
        at += 8 * (2 + 2 * count)
    at = b[LISTS]
    for _ in range(b[NUM_LISTS]):
        held = integers(at)
        if list_size(b[LIST_SIZE], (held[0],)) != held[1]:
            return False
        for i in range(held[1]):
            if list_item(b[LIST_ITEM], (held[0], i)) != held[2 + i]:
                return False
        at += 8 * (2 + held[1])
    return True


@njit(error_model="numpy", _nrt=False)
def same_counts(b):
    """Whether all parameters of a clock show its counters, and it is at this position of its window."""
    clocks = integers(b[CLOCKS])
    for c in range(b[NUM_CLOCKS]):
        clock, count, calls = doubles(clocks[3 * c]), clocks[3 * c + 1], clocks[3 * c + 2]
        steps, products = SEEN + count, SEEN + 2 * count
        for i in range(count):
            if clock[steps + i] * float64(calls) + float64(b[POSITION]) != clock[CALLS]:
                return False
            if clock[products + i] != clock[MOMENTUM_PRODUCT]:
                return False
    return True


@njit(error_model="numpy", _nrt=False)
def apart(b, begin, end):
    """Whether memory reaches into none of the ranges: the last that begins before its end, or one before it, might."""
    lows, low, high = integers(b[LOWS]), int64(0), b[NUM_RANGES]
    while low < high:
        middle = (low + high) // 2
        if lows[middle] < end:
            low = middle + 1
        else:
            high = middle
    return low == 0 or integers(b[HIGHS])[low - 1] <= begin


def refresh(source: str) -> Any:
    """The kernel that writes the addresses of gradients into tables, if all is as expected. Called with the GIL held.

    Args:
        source: What the arrays are: "numpy_array" or "torch_tensor".
    """
    look = globals()[source]

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b = integers(block)
        b[FITS] = 0
        if not same_members(b) or not same_counts(b) or list_size(b[LIST_SIZE], (b[LIST],)) != b[NUM_GRADS]:
            return
        objects, wanteds, cells = integers(b[OBJECTS]), integers(b[WANTED]), integers(b[CELLS])
        words, fixed = integers(b[WORDS]), b[NUM_FIXED]
        for i in range(fixed + b[NUM_GRADS]):
            wanted, cell = integers(wanteds[i]), integers(cells[i])
            array = objects[i] if i < fixed else list_item(b[LIST_ITEM], (b[LIST], i - fixed))
            if integers(array)[OBJECT_TYPE] != wanted[PYTHON_TYPE]:
                return
            address = look(array, wanted, words)
            if address == -1:
                return
            if address == cell[0] or wanted[LOW] == wanted[HIGH]:  # nothing else has moved, so it is apart as before
                continue
            if i < fixed or (address & (wanted[ALIGNMENT] - 1)) != 0:
                return
            if not apart(b, address + wanted[LOW], address + wanted[HIGH]):
                return
            cell[0] = address
        b[FITS] = 1

    return kernel
