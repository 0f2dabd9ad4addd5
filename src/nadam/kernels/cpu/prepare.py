"""The kernels that run a pass and do what goes before or after it, compiled by Numba from the functions of `core`.

Both end where Python's way ends, bit for bit: the functions are the same, so are the C library's, and no fastmath flag
lets the compiler take others.
"""

import math
from typing import Any

from llvmlite import ir
from numba import float64, int64, literal_unroll, njit, types, uint32
from numba.extending import intrinsic

from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SEEN, SKIPPED
from nadam.core.rebind import bind_scalars, rebind
from nadam.core.scalars import Settings, log, where
from nadam.kernels import layout as at
from nadam.kernels.cpu import plan as own
from nadam.kernels.cpu.formats import CASTS, FORMATS, hash32
from nadam.kernels.cpu.memory import doubles, fields_of, integers, pointer_to
from nadam.kernels.cpu.passes import maximum


@intrinsic
def run(typing: Any, function: Any, block: Any, budget: Any) -> Any:
    """Call another kernel by its address; none raises."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, result = ir.IntType(64), ir.IntType(32)
        with builder.goto_entry_block():
            nowhere = builder.ptrtoint(builder.alloca(word, 8), word)
        target = builder.inttoptr(args[0], ir.PointerType(ir.FunctionType(result, [word] * 4)))
        builder.call(target, [nowhere, nowhere, args[1], args[2]])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), build


@njit(error_model="numpy", _nrt=False)
def start(arguments):
    """All chunks of a table are to be drawn again."""
    control = integers(arguments[at.CONTROL])
    control[at.TICKET] = control[at.STOP] = 0


def norms() -> Any:
    """The kernel that measures all gradients and adds up the chunks of each, in their order.

    With a budget of 0 it only prepares, with one of -1 it only adds up: threads share the pass in between.
    """

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b, numbers = integers(block), doubles(block)
        arguments, found = integers(b[own.ARGUMENTS]), doubles(b[own.NORMS])
        totals, outside = doubles(arguments[at.EXTRA + 2]), integers(arguments[at.EXTRA + 3])
        if budget >= 0:
            for chunk in range(arguments[at.NUM_CHUNKS]):
                totals[chunk], outside[chunk] = 0.0, 0
            start(arguments)
            run(b[own.PASS], b[own.ARGUMENTS], budget)
        for tensor in range(b[own.NUM_TENSORS]):
            found[tensor] = 0.0
        chunks = integers(arguments[at.CHUNKS])
        for chunk in range(arguments[at.NUM_CHUNKS]):
            found[chunks[at.CHUNK_COLUMNS * chunk + at.TENSOR]] += totals[chunk]
        b[own.FINITE] = 1
        for tensor in range(b[own.NUM_TENSORS]):
            found[tensor] = math.sqrt(found[tensor] * numbers[own.SQUARE])
            if math.isinf(found[tensor]):
                b[own.FINITE] = 0

    return kernel


def update(compute: str, rounds: bool) -> Any:
    """The kernel that makes an update's scalars, counters and, if it ``rounds``, keys, and runs the one pass."""
    values, words, narrow = pointer_to(FORMATS[compute].storage), pointer_to(uint32), CASTS[compute]
    settings = fields_of(Settings, float64)
    made = bind_scalars(
        lambda function, **names: njit(rebind(function, **names)),
        where=njit(rebind(where)),
        maximum=maximum,
        sqrt=math.sqrt,
        expm1=math.expm1,
        log=njit(rebind(log, math=math)),
    )
    scalars = made["scalars"]

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b, x = integers(block), doubles(block)
        arguments = integers(b[own.ARGUMENTS])
        counters, after = doubles(arguments[at.COUNTERS]), doubles(arguments[at.NEXT_COUNTERS])
        step = float64(int64(counters[CALLS]) + 1)
        s, product = scalars(
            settings(block + 8 * own.SETTINGS), step, step, counters[MOMENTUM_PRODUCT], 1.0, x[own.SMALLEST]
        )
        target = values(arguments[at.EXTRA + 2])
        for k, value in enumerate(literal_unroll(s)):
            target[k] = narrow(value)
        factors, decays, excluded = values(arguments[at.EXTRA]), values(arguments[at.EXTRA + 1]), doubles(b[own.DECAYS])
        for tensor in range(b[own.NUM_TENSORS]):
            factors[tensor] = narrow(x[own.GRAD_FACTOR])
            decays[tensor] = narrow(excluded[tensor] * s.decay)
        if rounds:
            keys, streams = words(arguments[at.EXTRA + 3]), integers(b[own.STREAMS])
            key = hash32(uint32(int64(step)), uint32(b[own.SEED]))
            for tensor in range(b[own.NUM_TENSORS]):
                keys[tensor] = hash32(uint32(streams[tensor]), key)
        after[CALLS], after[SKIPPED] = counters[CALLS] + 1.0, counters[SKIPPED]
        after[MOMENTUM_PRODUCT] = product
        shown = b[own.SHOWN]
        for k in range(SEEN + shown, SEEN + 2 * shown):
            after[k], after[k + shown] = counters[SEEN + shown] + 1.0, product
        start(arguments)
        run(b[own.PASS], b[own.ARGUMENTS], budget)

    return kernel
