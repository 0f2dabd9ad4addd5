"""The kernel behind `pointers.Pointers`, compiled by Numba: one call looks at all that a step is given."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import float64, int64, njit, types
from numba.extending import intrinsic

from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SEEN
from nadam.kernels.cpu import pointers as at
from nadam.kernels.cpu.memory import doubles, integers, pointer_to

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
    flags, ndim = small_integers(array + 8 * at.STRUCT_FLAGS)[0], small_integers(array + 8 * at.STRUCT_NDIM)[0]
    if header[at.DESCRIPTOR] != wanted[at.TYPE] or ndim != wanted[at.NDIM] or wanted[at.FLAGS] & ~flags != 0:
        return int64(-1)
    sizes, strides = integers(header[at.DIMENSIONS]), integers(header[at.STRIDES])
    for d in range(ndim):
        if sizes[d] != wanted[at.SHAPE + d] or strides[d] != wanted[at.SHAPE + ndim + d]:
            return int64(-1)
    return header[at.DATA]


@njit(inline="always")
def torch_tensor(tensor, wanted, words):
    """The address of a tensor's memory; -1 if it, or a dispatch key (sparse, negative and so on), is not as wanted."""
    impl = integers(integers(tensor)[words[at.IMPL]])
    geometry = words[at.SIZES]
    if impl[geometry + at.DTYPE] & at.DTYPE_MASK != wanted[at.TYPE] or impl[geometry + at.KEYS] != wanted[at.FLAGS]:
        return int64(-1)
    ndim, storage = impl[geometry], impl[words[at.STORAGE]]
    if ndim != wanted[at.NDIM] or impl[geometry + at.OFFSET] != wanted[at.START] or storage == 0:
        return int64(-1)
    for d in range(ndim):
        if ndim <= at.INLINE:
            size, stride = impl[geometry + 1 + d], impl[geometry + 1 + at.INLINE + d]
        else:
            size, stride = integers(impl[geometry + 1])[d], integers(impl[geometry + 1])[ndim + d]
        if size != wanted[at.SHAPE + d] or stride != wanted[at.SHAPE + ndim + d]:
            return int64(-1)
    return integers(storage)[words[at.STORAGE_DATA]] + wanted[at.SHIFT]


@njit(error_model="numpy", _nrt=False)
def same_members(b):
    """Whether dicts and lists hold the objects that they held. A dict may hold others as well."""
    place, scratch, words = b[at.DICTS], integers(b[at.SCRATCH]), b[at.SCRATCH]
    for _ in range(b[at.NUM_DICTS]):
        held = integers(place)
        found, count, scratch[0] = int64(0), held[1], 0
        while found < count and dict_next(b[at.DICT_NEXT], (held[0], words, words + 8, words + 16)) != 0:
            if scratch[1] == held[2 + 2 * found]:
                if scratch[2] != held[3 + 2 * found]:
                    return False
                found += 1
        if found != count:
            return False
        place += 8 * (2 + 2 * count)
    place = b[at.LISTS]
    for _ in range(b[at.NUM_LISTS]):
        held = integers(place)
        if list_size(b[at.LIST_SIZE], (held[0],)) != held[1]:
            return False
        for i in range(held[1]):
            if list_item(b[at.LIST_ITEM], (held[0], i)) != held[2 + i]:
                return False
        place += 8 * (2 + held[1])
    return True


@njit(error_model="numpy", _nrt=False)
def same_counts(b):
    """Whether all parameters show the counters that they share, and it is at this position of its window."""
    counters = integers(b[at.COUNTERS])
    for c in range(b[at.NUM_COUNTERS]):
        own, count, calls = doubles(counters[3 * c]), counters[3 * c + 1], counters[3 * c + 2]
        steps, products = SEEN + count, SEEN + 2 * count
        for i in range(count):
            if own[steps + i] * float64(calls) + float64(b[at.POSITION]) != own[CALLS]:
                return False
            if own[products + i] != own[MOMENTUM_PRODUCT]:
                return False
    return True


@njit(error_model="numpy", _nrt=False)
def apart(b, begin, end):
    """Whether memory reaches into none of the ranges: the last that begins before its end, or one before it, might."""
    lows, low, high = integers(b[at.LOWS]), int64(0), b[at.NUM_RANGES]
    while low < high:
        middle = (low + high) // 2
        if lows[middle] < end:
            low = middle + 1
        else:
            high = middle
    return low == 0 or integers(b[at.HIGHS])[low - 1] <= begin


def refresh(source: str) -> Any:
    """The kernel that writes the addresses of gradients into tables if all is as expected; called with the GIL held."""
    look = globals()[source]

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b = integers(block)
        b[at.FITS] = 0
        if not same_members(b) or not same_counts(b) or list_size(b[at.LIST_SIZE], (b[at.LIST],)) != b[at.NUM_GRADS]:
            return
        objects, wanteds, cells = integers(b[at.OBJECTS]), integers(b[at.WANTED]), integers(b[at.CELLS])
        words, fixed = integers(b[at.WORDS]), b[at.NUM_FIXED]
        for i in range(fixed + b[at.NUM_GRADS]):
            wanted, cell = integers(wanteds[i]), integers(cells[i])
            array = objects[i] if i < fixed else list_item(b[at.LIST_ITEM], (b[at.LIST], i - fixed))
            if integers(array)[at.OBJECT_TYPE] != wanted[at.PYTHON_TYPE]:
                return
            address = look(array, wanted, words)
            if address == -1:
                return
            if address == cell[0] or wanted[at.LOW] == wanted[at.HIGH]:
                continue  # nothing else has moved, so it is apart as before
            if i < fixed or (address & (wanted[at.ALIGNMENT] - 1)) != 0:
                return
            if not apart(b, address + wanted[at.LOW], address + wanted[at.HIGH]):
                return
            cell[0] = address
        b[at.FITS] = 1

    return kernel
