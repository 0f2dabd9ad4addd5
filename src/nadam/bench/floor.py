"""The floor: a compiled loop that reads and writes the bytes of a step and computes next to nothing.

It runs over the very arrays of the optimizer, because where arrays lie in memory can change the speed of a loop over
several of them by half, and it leaves their values alone: what it adds is zero, but only at run time. Chunks, threads
and the way in which threads draw chunks are those of the package.

Two forms are compiled, since either can be the faster one: one loop over all arrays at once, as the update itself is
written, and a loop for each array of a chunk, whose gradient is read together with the parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import njit, types, uint16

from nadam.bench.cases import Array
from nadam.bench.records import COMPRESSED
from nadam.kernels.cpu.machine_code import Kernel
from nadam.kernels.cpu.memory import fetch_add, integers, pointer_to
from nadam.kernels.cpu.threads import Sharing
from nadam.kernels.layout import CHUNK_COLUMNS, COUNT, START, TENSOR, TICKET, cut_into_chunks
from nadam.kernels.strides import address

FORMS = ("one loop", "a loop each")
# A row per tensor: its addresses. The block of a kernel's arguments, likewise int64.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ, EMA = range(5)
COLUMNS = 5
CONTROL, NUM_CHUNKS, ROWS, CHUNKS, ZEROS, TOTALS = range(6)
FAST = {"contract", "nsz", "reassoc"}
_STORAGE = {"float32": types.float32, "float64": types.float64, "bfloat16": types.uint16, COMPRESSED: types.uint16}
_STATE = {"float32": types.float32, "float64": types.float64, "bfloat16": types.float32, COMPRESSED: types.uint8}


def _arithmetic(dtype: str) -> tuple[Any, Any, Any]:
    """(mixed, joined, total): parameter with gradient, gradients together, and what a sum of gradients is kept in.

    Bits for bfloat16: Numba would make the sum of two uint16 64 bits wide, while `and` and `or` are narrowed again.
    """
    if _STORAGE[dtype] is types.uint16:
        return (
            njit(lambda p, g, zero: uint16(p | (g & zero)), inline="always"),
            njit(lambda total, g: uint16(total | g), inline="always"),
            types.uint16,
        )
    return (
        njit(lambda p, g, zero: p + g * zero, inline="always", fastmath=FAST),
        njit(lambda total, g: total + g, inline="always", fastmath=FAST),
        _STORAGE[dtype],
    )


def _drawn(body: Any) -> Any:
    """The kernel around what is done with one chunk: draws chunks until none or no budget is left."""

    @njit(nogil=True, error_model="numpy")
    def kernel(block, budget):  # type: ignore[no-untyped-def]
        b = integers(block)
        for _ in range(budget):
            ticket = fetch_add(b[CONTROL] + 8 * TICKET)
            if ticket >= b[NUM_CHUNKS]:
                return
            chunk = integers(b[CHUNKS] + 8 * CHUNK_COLUMNS * ticket)
            row = integers(b[ROWS] + 8 * COLUMNS * chunk[TENSOR])
            body(row, chunk[START], chunk[COUNT], b, ticket)

    signature = types.void(types.int64, types.int64)
    kernel.compile(signature)
    compiled = kernel.overloads[signature.args]
    made = Kernel(kernel)
    made.address = compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
    return made


@cache
def _mover(dtype: str, averaged: bool, form: str) -> Any:
    """Reads parameter, gradient, moments and average; writes all but the gradient."""
    stored, state = pointer_to(_STORAGE[dtype]), pointer_to(_STATE[dtype])
    width, state_width = _STORAGE[dtype].bitwidth // 8, _STATE[dtype].bitwidth // 8
    mixed, _, _ = _arithmetic(dtype)

    @njit(error_model="numpy", fastmath=FAST)
    def one_loop(p, g, m, v, e, n, zero, state_zero):  # type: ignore[no-untyped-def]
        for i in range(n):
            p[i] = mixed(p[i], g[i], zero)
            m[i] += state_zero
            v[i] += state_zero
            if averaged:
                e[i] += state_zero

    @njit(error_model="numpy", fastmath=FAST)
    def a_loop_each(p, g, m, v, e, n, zero, state_zero):  # type: ignore[no-untyped-def]
        for i in range(n):
            p[i] = mixed(p[i], g[i], zero)
        for i in range(n):
            m[i] += state_zero
        for i in range(n):
            v[i] += state_zero
        if averaged:
            for i in range(n):
                e[i] += state_zero

    elements = one_loop if form == FORMS[0] else a_loop_each

    @njit(error_model="numpy")
    def body(row, start, n, b, ticket):  # type: ignore[no-untyped-def]
        p, g = stored(row[PARAM] + start * width), stored(row[GRAD] + start * width)
        offset = start * state_width
        m, v, e = state(row[EXP_AVG] + offset), state(row[EXP_AVG_SQ] + offset), state(row[EMA] + offset)
        elements(p, g, m, v, e, n, stored(b[ZEROS])[0], state(b[ZEROS])[0])

    return _drawn(body)


@cache
def _reader(dtype: str) -> Any:
    """Reads the gradients, as the norm does."""
    stored, width = pointer_to(_STORAGE[dtype]), _STORAGE[dtype].bitwidth // 8
    _, joined, total_type = _arithmetic(dtype)

    @njit(error_model="numpy", fastmath=FAST)
    def elements(g, n):  # type: ignore[no-untyped-def]
        total = total_type(0)
        for i in range(n):
            total = joined(total, g[i])
        return total

    @njit(error_model="numpy")
    def body(row, start, n, b, ticket):  # type: ignore[no-untyped-def]
        # Kept, or the loop would be left out.
        stored(b[TOTALS] + 8 * ticket)[0] = elements(stored(row[GRAD] + start * width), n)

    return _drawn(body)


class Floor:
    """The floor of a step over arrays that lie dense in memory.

    Args:
        moved: Lists of arrays, as of `cases.Ours`: parameters, gradients, moments, and averages or none.
        kind: "full" for one more read of the gradients.
        dtype: Number format of parameters and gradients.
        default_threads: PyTorch's number of threads, to move the bytes on these.
        forms: Those to compile.
    """

    def __init__(
        self,
        moved: Sequence[Sequence[Array]],
        kind: str,
        dtype: str,
        default_threads: Callable[[], int] | None = None,
        forms: Sequence[str] = FORMS,
    ) -> None:
        self._keep = moved
        sizes = [array.size for array in moved[0]]
        self._rows, self._chunks = np.zeros((len(sizes), COLUMNS), np.int64), cut_into_chunks(sizes)
        for column, arrays in enumerate(moved):
            self.point_to(column, arrays)
        self._control = np.zeros(2, np.int64)
        self._zeros, self._totals = np.zeros(1), np.zeros(len(self._chunks))
        arrays = (self._rows, self._chunks, self._zeros, self._totals)
        common = [address(self._control), len(self._chunks)]
        self._block = np.array([*common, *map(address, arrays)], np.int64)
        self._shared = self._control.data
        self._given = sum(sizes), len(self._chunks), default_threads
        readers = [_reader(dtype)] if kind == "full" else []
        self.forms = {form: self._pass([*readers, _mover(dtype, len(moved) > EMA, form)]) for form in forms}

    def _pass(self, kernels: Sequence[Any]) -> Callable[[], None]:
        block, sharing = address(self._block), [Sharing(*self._given) for _ in kernels]

        def run() -> None:
            for kernel, shared in zip(kernels, sharing, strict=True):
                shared.run(kernel, block, self._shared)

        return run

    def point_to(self, column: int, arrays: Sequence[Array]) -> None:
        """Take other arrays of the same sizes."""
        self._rows[:, column] = [address(array) for array in arrays]
