"""The kernels that run a pass and do what goes before or after it, compiled by Numba from the functions of `core`.

Both end where Python's way ends, bit for bit: the functions are the same, so are the C library's, and no fastmath flag
lets the compiler take others.
"""

import math
from typing import Any

from llvmlite import ir
from numba import float64, int64, literal_unroll, njit, types
from numba.extending import intrinsic

from nadam.core import average, coefficients
from nadam.core import scalars as core_scalars
from nadam.core.clock import CALLS, MOMENTUM_PRODUCT, SEEN, SKIPPED
from nadam.core.rebind import rebind
from nadam.core.scalars import Settings
from nadam.kernels.combined import (
    ARGUMENTS,
    DECAYS,
    FINITE,
    GRAD_FACTOR,
    NORMS,
    NUM_TENSORS,
    PASS,
    SETTINGS,
    SHOWN,
    SMALLEST,
    SQUARE,
)
from nadam.kernels.formats import CASTS, FORMATS
from nadam.kernels.memory import doubles, fields_of, integers, pointer_to
from nadam.kernels.numba import maximum
from nadam.kernels.spans import (
    ADVANCED,
    CHUNK_COLUMNS,
    CHUNKS,
    CLOCK,
    CONTROL,
    EXTRA,
    NUM_CHUNKS,
    STOP,
    TENSOR,
    TICKET,
)


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
    control = integers(arguments[CONTROL])
    control[TICKET] = control[STOP] = 0


def norms() -> Any:
    """The kernel that measures all gradients and adds up the chunks of each, in their order."""

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b, numbers = integers(block), doubles(block)
        arguments, found = integers(b[ARGUMENTS]), doubles(b[NORMS])
        totals, outside = doubles(arguments[EXTRA + 2]), integers(arguments[EXTRA + 3])
        for chunk in range(arguments[NUM_CHUNKS]):
            totals[chunk], outside[chunk] = 0.0, 0
        start(arguments)
        run(b[PASS], b[ARGUMENTS], budget)
        for tensor in range(b[NUM_TENSORS]):
            found[tensor] = 0.0
        chunks = integers(arguments[CHUNKS])
        for chunk in range(arguments[NUM_CHUNKS]):
            found[chunks[CHUNK_COLUMNS * chunk + TENSOR]] += totals[chunk]
        b[FINITE] = 1
        for tensor in range(b[NUM_TENSORS]):
            found[tensor] = math.sqrt(found[tensor] * numbers[SQUARE])
            if math.isinf(found[tensor]):
                b[FINITE] = 0

    return kernel


def update(compute: str) -> Any:
    """The kernel that makes an update's scalars and counters and runs the one pass.

    Args:
        compute: What the pass computes in.
    """
    values, narrow = pointer_to(FORMATS[compute].storage), CASTS[compute]
    settings = fields_of(Settings, float64)
    momentum = njit(rebind(coefficients.momentum, MOMENTUM_WARMUP=coefficients.MOMENTUM_WARMUP))
    names = {"log": njit(rebind(coefficients.log, math=math)), "momentum": momentum}
    names |= {"sqrt": math.sqrt, "expm1": math.expm1, "Coefficients": coefficients.Coefficients}
    where = njit(rebind(average.where))
    scalars = njit(
        rebind(
            core_scalars.scalars,
            coefficients=njit(rebind(coefficients.coefficients, **names)),
            averaging=njit(rebind(average.averaging, where=where, Averaging=average.Averaging)),
            clamp_eps=njit(rebind(coefficients.clamp_eps, where=where, maximum=maximum)),
            where=where,
            Scalars=core_scalars.Scalars,
        )
    )

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b, x = integers(block), doubles(block)
        arguments = integers(b[ARGUMENTS])
        clock, advanced = doubles(arguments[CLOCK]), doubles(arguments[ADVANCED])
        step = float64(int64(clock[CALLS]) + 1)
        s, product = scalars(settings(block + 8 * SETTINGS), step, step, clock[MOMENTUM_PRODUCT], 1.0, x[SMALLEST])
        target = values(arguments[EXTRA + 2])
        for k, value in enumerate(literal_unroll(s)):
            target[k] = narrow(value)
        factors, decays, excluded = values(arguments[EXTRA]), values(arguments[EXTRA + 1]), doubles(b[DECAYS])
        for tensor in range(b[NUM_TENSORS]):
            factors[tensor] = narrow(x[GRAD_FACTOR])
            decays[tensor] = narrow(excluded[tensor] * s.decay)
        advanced[CALLS], advanced[SKIPPED] = clock[CALLS] + 1.0, clock[SKIPPED]
        advanced[MOMENTUM_PRODUCT] = product
        shown = b[SHOWN]
        for k in range(SEEN + shown, SEEN + 2 * shown):
            advanced[k], advanced[k + shown] = clock[SEEN + shown] + 1.0, product
        start(arguments)
        run(b[PASS], b[ARGUMENTS], budget)

    return kernel
