"""One native look at every array before each step: whether all lies as when its tables were made.

Users do not know of these tables: they move, share and exchange state and parameters, and edit groups. So the C structs
behind the Python objects are read: that dicts and lists hold the same objects, that these lie where they lay, that the
counters are those that were left, and where the new gradients lie. If anything differs, all is prepared anew.

For 300 small PyTorch parameters, 1,800 tensors with state and counters, a whole step takes 0.92 of what it took to ask
PyTorch for parameters and gradients alone, by its function for DLPack at 55 ns a tensor; in a training loop 0.96.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from nadam.kernels.cpu import machine_code
from nadam.kernels.strides import address, bounds

Array = NDArray[Any]

# Words of the C struct of an array (PyArrayObject_fields, part of NumPy's stable C interface).
DATA, STRUCT_NDIM, DIMENSIONS, STRIDES, DESCRIPTOR, STRUCT_FLAGS = 2, 3, 4, 5, 7, 8
WRITEABLE = 0x0400
# Every Python object's word for its type.
OBJECT_TYPE = 1
# Where a tensor's C++ objects keep what is looked at; words that `tensor_words` finds: the TensorImpl's address in the
# Python object, the storage's in the TensorImpl, the number of dimensions there, the memory's address in the storage.
IMPL, STORAGE, SIZES, STORAGE_DATA = range(4)
# From that number on follow sizes and strides, within the struct for so many dimensions and by address for more, then
# the storage's offset in elements, the number of elements, dtype and device (its low five bytes), dispatch keys.
INLINE = 5
OFFSET, DTYPE, KEYS = (2 * INLINE + 1 + i for i in (0, 2, 3))
DTYPE_MASK = (1 << 40) - 1

# What is wanted of an array: its class; its dtype (and device); dimensions; flags that are set (of a tensor: all of its
# dispatch keys); of a tensor, where it begins in its storage, in bytes and in elements; alignment; its first and last
# byte's place from its address; then sizes and strides.
PYTHON_TYPE, TYPE, NDIM, FLAGS, SHIFT, START, ALIGNMENT, LOW, HIGH, SHAPE = range(10)

# Arguments of the kernel: addresses of arrays that stay, of what is wanted of each array, of the words that hold their
# addresses; how many stay and how many gradients there are; ranges that no gradient may reach into; the answer.
OBJECTS, WANTED, CELLS, NUM_FIXED, NUM_GRADS, LOWS, HIGHS, NUM_RANGES, FITS = range(9)
# The list of gradients, Python's functions, the words of tensors; then what the dicts and lists hold, and the counters.
LIST, LIST_SIZE, LIST_ITEM, DICT_NEXT, SCRATCH, WORDS = range(9, 15)
DICTS, NUM_DICTS, LISTS, NUM_LISTS, COUNTERS, NUM_COUNTERS, POSITION = range(15, 22)


class Look(NamedTuple):
    """One array that is looked at."""

    array: Any
    wanted: NDArray[np.int64]  # what is to be found of it
    where: int  # of one that stays, its address; of a gradient, that of the table's word that gets its address


class Held(NamedTuple):
    """What is expected to be in the user's hands as it was.

    Attributes:
        dicts: Dicts; of each the keys whose values are to be the same objects, in the order in which they lie there.
        lists: Lists, which are to hold the same objects.
        counters: Arrays of counters with the number of parameters that show theirs, and the calls per update.
    """

    dicts: Sequence[tuple[dict[Any, Any], Sequence[Any]]] = ()
    lists: Sequence[list[Any]] = ()
    counters: Sequence[tuple[NDArray[np.float64], int, int]] = ()


class Pointers:
    """Looks whether all is as it was, and puts the addresses of new gradients into the tables."""

    def __init__(
        self,
        source: str,
        fixed: Sequence[Look],
        grads: Sequence[Look],
        written: Sequence[Array],
        held: Held | None = None,
    ) -> None:
        dicts, lists, counters = held or Held()
        looks, addresses = [*fixed, *grads], np.array([look.where for look in fixed], np.int64)
        # What is looked up by identity is held, so that its identity stays its own; gradients are not.
        self._keep: list[Any] = [addresses, [look.array for look in fixed], [look.wanted for look in looks], held]
        members = [[d, *((key, d[key]) for key in keys)] for d, keys in dicts]
        self._keep += [members, [list(one) for one in lists]]
        ranges = sorted(bounds(array) for array in written if array.size)
        scratch, words = np.zeros(3, np.int64), (tensor_words() if source == "torch_tensor" else None) or (0,)
        listed = (word for one in lists for word in (id(one), len(one), *map(id, one)))
        flat = (word for d, *items in members for word in (id(d), len(items), *(id(x) for item in items for x in item)))
        arrays = {
            OBJECTS: [id(look.array) for look in fixed],
            WANTED: [address(look.wanted) for look in looks],
            CELLS: [*(address(addresses) + 8 * np.arange(len(fixed))), *(look.where for look in grads)],
            LOWS: [low for low, _ in ranges],
            HIGHS: np.maximum.accumulate([high for _, high in ranges] or [0]),
            SCRATCH: scratch,
            WORDS: words,
            DICTS: list(flat),
            LISTS: list(listed),
            COUNTERS: [word for now, *numbers in counters for word in (address(now), *numbers)],
        }
        block = np.zeros(POSITION + 1, np.int64)
        for place, values in arrays.items():
            array = np.array(values, np.int64)
            self._keep.append(array)
            block[place] = address(array)
        block[NUM_FIXED], block[NUM_GRADS], block[NUM_RANGES] = len(fixed), len(grads), len(ranges)
        block[NUM_DICTS], block[NUM_LISTS], block[NUM_COUNTERS] = len(dicts), len(lists), len(counters)
        block[LIST_SIZE], block[LIST_ITEM], block[DICT_NEXT] = _python_functions()
        self._block, self._address, self._words = block, address(block), block.data
        self._kernel = machine_code.kernel_holding_gil("refresh", "refresh", source)

    def fits(self, grads: list[Any], position: int = 0) -> bool:
        """Whether all is as it was; if so, the addresses of these gradients are in the tables."""
        self._words[LIST], self._words[POSITION] = id(grads), position
        self._kernel(self._address, 0)
        return bool(self._words[FITS])


@cache
def _python_functions() -> tuple[int, ...]:
    functions = (getattr(ctypes.pythonapi, name) for name in ("PyList_Size", "PyList_GetItem", "PyDict_Next"))
    return tuple(ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions)


def wanted(
    array: Any, kind: int, flags: int, memory: Array, strides: Iterable[int], start: int = 0
) -> NDArray[np.int64]:
    """What a kernel is to find where it finds an array that lies like this one."""
    width = memory.itemsize // 2 if memory.dtype.kind == "c" else memory.itemsize
    alignment = width if address(memory) % width == 0 else 1
    low, high = (bound - address(memory) for bound in bounds(memory))
    shift = start * memory.itemsize
    words = [id(type(array)), kind, memory.ndim, flags, shift, start, alignment, low, high, *memory.shape, *strides]
    return np.array(words, np.int64)


def array_wanted(array: Array, flags: int) -> NDArray[np.int64]:
    """What a kernel is to find of a NumPy array."""
    return wanted(array, id(array.dtype), flags, array, array.strides)


def tensor_wanted(tensor: Any, memory: Array) -> NDArray[np.int64]:
    """What a kernel is to find of a PyTorch tensor, whose memory is that of an array."""
    places = tensor_words()
    assert places is not None
    impl = _words(id(tensor), places[IMPL] + 1)[-1]
    geometry = _words(impl + 8 * places[SIZES], KEYS + 1)
    kind, keys = geometry[DTYPE] & DTYPE_MASK, geometry[KEYS]
    return wanted(tensor, kind, keys, memory, tensor.stride(), tensor.storage_offset())


def _words(where: int, count: int) -> list[int]:
    return list((ctypes.c_int64 * count).from_address(where))


@cache
def objects_readable() -> bool:
    """Whether this interpreter keeps an object's type where the kernel reads it, and no other thread runs meanwhile."""
    if sys.implementation.name != "cpython" or ctypes.sizeof(ctypes.c_void_p) != 8:
        return False
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return False
    some: list[Any] = [2.0, "three", [], np.zeros(1)]
    return all(_words(id(one), OBJECT_TYPE + 1)[OBJECT_TYPE] == id(type(one)) for one in some)


@cache
def arrays_readable() -> bool:
    """Whether this NumPy keeps an array's header where the kernel reads it."""
    if not objects_readable():
        return False
    array = np.zeros((3, 5), np.float32)[:, 1::2]
    words = _words(id(array), STRUCT_FLAGS + 1)
    ndim, flags = words[STRUCT_NDIM] & 0xFFFFFFFF, words[STRUCT_FLAGS] & 0xFFFFFFFF
    if (words[DATA], ndim, words[DESCRIPTOR]) != (address(array), 2, id(array.dtype)) or not flags & WRITEABLE:
        return False
    array.flags.writeable = False
    flags = _words(id(array), STRUCT_FLAGS + 1)[STRUCT_FLAGS]
    sizes, strides = (tuple(_words(words[word], 2)) for word in (DIMENSIONS, STRIDES))
    return not flags & WRITEABLE and (sizes, strides) == (array.shape, array.strides)


@cache
def tensor_words() -> tuple[int, ...] | None:
    """Where this PyTorch keeps what the kernel reads of a tensor, as it tells itself; None where this is not seen."""
    torch: Any = sys.modules["torch"]
    if not objects_readable():
        return None
    empty, tensors = torch.empty, []
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        memory = empty(7 * 11 * 13, dtype=dtype, device="cpu")
        volume = memory.view(7, 11, 13)
        tensors += [volume, volume[1:, 2:, ::3], volume[2].t(), memory[5], memory[:1].view((1,) * 6)]
        tensors.append(torch._neg_view(memory))
    tensors += [torch.nn.Parameter(empty(2, 3, 4, 5, 6, 7, device="cpu")), empty(0, device="cpu")]
    volume = tensors[1]
    try:
        storage = volume.untyped_storage()
        places = [_words(id(volume), 4).index(volume._cdata), _words(volume._cdata, 8).index(storage._cdata)]
        geometry = _words(volume._cdata, 12)
        places.append(geometry.index(volume.dim(), places[STORAGE] + 1))
        places.append(_words(storage._cdata, 4).index(storage.data_ptr()))
    except (AttributeError, RuntimeError, ValueError):
        return None
    kinds: dict[Any, set[tuple[int, int]]] = {}
    for tensor in tensors:
        if not _is_read(tensor, places):
            return None
        words = _words(tensor._cdata + 8 * places[SIZES], KEYS + 1)
        kinds.setdefault((tensor.dtype, tensor.is_neg()), set()).add((words[DTYPE] & DTYPE_MASK, words[KEYS]))
    distinct = set.union(*kinds.values())
    return tuple(places) if len(distinct) == len(kinds) and all(len(one) == 1 for one in kinds.values()) else None


def _is_read(tensor: Any, places: Sequence[int]) -> bool:
    """Whether these words of a tensor say what PyTorch says of it."""
    storage = tensor.untyped_storage()
    if _words(id(tensor), places[IMPL] + 1)[-1] != tensor._cdata:
        return False
    if _words(tensor._cdata, places[STORAGE] + 1)[-1] != storage._cdata:
        return False
    if _words(storage._cdata, places[STORAGE_DATA] + 1)[-1] != storage.data_ptr():
        return False
    ndim, words = tensor.dim(), _words(tensor._cdata + 8 * places[SIZES], KEYS + 1)
    far = ndim > INLINE
    sizes = _words(words[1], 2 * ndim) if far else words[1:]
    strides = sizes[ndim:] if far else sizes[INLINE:]
    found = (words[0], tuple(sizes[:ndim]), tuple(strides[:ndim]), words[OFFSET], words[OFFSET + 1])
    return found == (ndim, tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.numel())
