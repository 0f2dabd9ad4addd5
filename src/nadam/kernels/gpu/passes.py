"""The passes over memory on a GPU, compiled by Triton from the rule.

A launch takes all tensors of a bucket that have the same number formats, through a table of addresses and one of
chunks, both on the device; a program takes a chunk, and the device's own scheduler shares them out, so there is
nothing to fit to a device's size. Scalars come from the device, where triton_prepare.py has put them: the host waits
for nothing.

Where a tensor's memory is aligned to 16 bytes, and all of its state's, it goes 16 bytes at once; what is left over, and
all of a tensor that is not, element by element.
"""

import triton
import triton.language as tl

from nadam.core.dtypes import SHRINK, SPLIT
from nadam.core.scalars import Scalars
from nadam.kernels import layout as at
from nadam.kernels.gpu.formats import (
    element,
    element_bfloat16,
    element_float16,
    hash32,
    join_bfloat16,
    load,
    load_if,
    narrow,
    narrow_bfloat16_stochastic,
    rest_of_bfloat16,
    scalars_at,
    store,
    widen,
    widen_bfloat16,
)

CHUNK = 4096  # elements of a program
BLOCK = 1024  # elements at once: 8 for each of 128 threads, so that of two bytes each they fill 16
WARPS = 4

# Columns of a tensor's row: those of spans.py, but here all tensors are dense, and the last two tell other things:
# which of the bucket's parameters it is, and flags.
KEY, FLAGS = at.PARAM_LAYOUT, at.GRAD_LAYOUT
ALIGNED, EXCLUDED = 1, 2  # flags: to 16 bytes; from weight decay
# What a step does, as triton_prepare.py has decided, and its scalars.
SKIP, ACCUMULATE, UPDATE = range(3)
# The factor is that of all gradients; with clipping of each, tensors have factors of their own.
SCALARS = ("mode", "factor", *Scalars._fields)
# What `measure` gives of a chunk: sum of squares, the same of values times SHRINK, number of values that are too large.
PARTIALS = 3

_COLUMNS, _CHUNK_COLUMNS = tl.constexpr(at.COLUMNS), tl.constexpr(at.CHUNK_COLUMNS)
_TENSOR, _START, _COUNT = tl.constexpr(at.TENSOR), tl.constexpr(at.START), tl.constexpr(at.COUNT)
_PARAM, _GRAD, _EXP_AVG = tl.constexpr(at.PARAM), tl.constexpr(at.GRAD), tl.constexpr(at.EXP_AVG)
_EXP_AVG_SQ, _EMA = tl.constexpr(at.EXP_AVG_SQ), tl.constexpr(at.EMA)
_ACCUMULATOR, _REMAINDER = tl.constexpr(at.ACCUMULATOR), tl.constexpr(at.REMAINDER)
_KEY, _FLAGS, _ALIGNED, _EXCLUDED = (tl.constexpr(value) for value in (KEY, FLAGS, ALIGNED, EXCLUDED))
_ACCUMULATE, _UPDATE = tl.constexpr(ACCUMULATE), tl.constexpr(UPDATE)
_FIRST = tl.constexpr(SCALARS.index(Scalars._fields[0]))
_MODE, _FACTOR = (tl.constexpr(SCALARS.index(name)) for name in ("mode", "factor"))
_UNSCALE, _DECAY = (tl.constexpr(SCALARS.index(name)) for name in ("inv_scale", "decay"))
_PARTIALS, _SHRINK, _SPLIT = tl.constexpr(PARTIALS), tl.constexpr(SHRINK["float64"]), tl.constexpr(SPLIT)
_CALLS = tl.constexpr(0)


@triton.jit
def _wide(row, count):
    """How many of a chunk's elements go 16 bytes at once, so computed that the compiler sees it is a multiple of 8."""
    return count // 8 * ((tl.load(row + _FLAGS) & _ALIGNED).to(tl.int32) * 8)


@triton.jit
def _memory(row):
    """Where a tensor and its state lie."""
    param, grad, exp_avg = tl.load(row + _PARAM), tl.load(row + _GRAD), tl.load(row + _EXP_AVG)
    exp_avg_sq, ema, accumulator = tl.load(row + _EXP_AVG_SQ), tl.load(row + _EMA), tl.load(row + _ACCUMULATOR)
    return param, tl.load(row + _REMAINDER), grad, exp_avg, exp_avg_sq, ema, accumulator


@triton.jit
def _block(
    memory, s, start, left, factor, decay, key,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PARAM_ELEMENT: tl.constexpr, GRAD_ELEMENT: tl.constexpr,
    COMPUTE: tl.constexpr, ACCUMULATED: tl.constexpr, LIMITED: tl.constexpr, AVERAGED: tl.constexpr,
    COUPLED: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Update one block: load, widen, what each element goes through, narrow, store."""
    param_at, rest_at, grad_at, exp_avg_at, exp_avg_sq_at, ema_at, accumulator_at = memory
    if ACCUMULATED:
        grad = widen(load_if(grad_at, start, left, GRAD_ELEMENT, BLOCK, WIDE), GRAD, COMPUTE)
        accumulator = load(accumulator_at, start, left, COMPUTE, BLOCK, WIDE)
    else:
        grad = widen(load(grad_at, start, left, GRAD_ELEMENT, BLOCK, WIDE), GRAD, COMPUTE)
        accumulator = grad
    half = load(param_at, start, left, PARAM_ELEMENT, BLOCK, WIDE)
    if PARAM == _SPLIT:
        param = join_bfloat16(half, load(rest_at, start, left, tl.uint16, BLOCK, WIDE))
    else:
        param = widen(half, PARAM, COMPUTE)
    if ROUNDED:
        exp_avg = widen_bfloat16(load(exp_avg_at, start, left, tl.uint16, BLOCK, WIDE))
    else:
        exp_avg = load(exp_avg_at, start, left, COMPUTE, BLOCK, WIDE)
    exp_avg_sq = load(exp_avg_sq_at, start, left, COMPUTE, BLOCK, WIDE)
    if AVERAGED:
        ema = load(ema_at, start, left, COMPUTE, BLOCK, WIDE)
    else:
        ema = param
    if PARAM == "bfloat16":
        param, exp_avg, exp_avg_sq, ema = element_bfloat16(
            param, grad, exp_avg, exp_avg_sq, ema, accumulator, factor, decay, s,
            ACCUMULATED, LIMITED, COUPLED, AVERAGED,
        )  # fmt: skip
    elif PARAM == "float16":
        param, exp_avg, exp_avg_sq, ema = element_float16(
            param, grad, exp_avg, exp_avg_sq, ema, accumulator, factor, decay, s,
            ACCUMULATED, LIMITED, COUPLED, AVERAGED,
        )  # fmt: skip
    else:
        param, exp_avg, exp_avg_sq, ema = element(
            param, grad, exp_avg, exp_avg_sq, ema, accumulator, factor, decay, s,
            ACCUMULATED, LIMITED, COUPLED, AVERAGED,
        )  # fmt: skip
    store(exp_avg_sq_at, start, left, exp_avg_sq, COMPUTE, BLOCK, WIDE)
    if ROUNDED:
        chance = hash32(start + tl.arange(0, BLOCK), key)
        store(exp_avg_at, start, left, narrow_bfloat16_stochastic(exp_avg, chance), tl.uint16, BLOCK, WIDE)
    else:
        store(exp_avg_at, start, left, exp_avg, COMPUTE, BLOCK, WIDE)
    if AVERAGED:
        store(ema_at, start, left, ema, COMPUTE, BLOCK, WIDE)
    if ACCUMULATED:
        store(accumulator_at, start, left, tl.zeros((BLOCK,), COMPUTE), COMPUTE, BLOCK, WIDE)
    store(param_at, start, left, narrow(param, PARAM), PARAM_ELEMENT, BLOCK, WIDE)
    if PARAM == _SPLIT:
        store(rest_at, start, left, rest_of_bfloat16(param), tl.uint16, BLOCK, WIDE)


@triton.jit
def _add_block(
    grad_at, accumulator_at, start, left, inv_scale,
    GRAD: tl.constexpr, GRAD_ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add a block of the unscaled gradient to the accumulator."""
    grad = widen(load(grad_at, start, left, GRAD_ELEMENT, BLOCK, WIDE), GRAD, COMPUTE)
    total = load(accumulator_at, start, left, COMPUTE, BLOCK, WIDE) + grad * inv_scale
    store(accumulator_at, start, left, total, COMPUTE, BLOCK, WIDE)


@triton.jit(do_not_specialize_on_alignment=["chunks"])
def one_pass(
    rows, chunks, scalars, factors, active, step_key,
    PARAM: tl.constexpr, GRAD: tl.constexpr, PARAM_ELEMENT: tl.constexpr, GRAD_ELEMENT: tl.constexpr,
    ACCUMULATED: tl.constexpr, LIMITED: tl.constexpr, AVERAGED: tl.constexpr, COUPLED: tl.constexpr,
    ROUNDED: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do with one chunk what the step does: update it, add its gradient to the accumulator, or leave it alone."""
    COMPUTE: tl.constexpr = scalars.dtype.element_ty
    mode = tl.load(scalars + _MODE)
    chunk = chunks + tl.program_id(0).to(tl.int64) * _CHUNK_COLUMNS
    tensor, start, count = tl.load(chunk + _TENSOR), tl.load(chunk + _START), tl.load(chunk + _COUNT).to(tl.int32)
    row = rows + tensor * _COLUMNS
    wide = _wide(row, count)
    moves = mode == _UPDATE
    if ACCUMULATED:
        moves = moves & (tl.load(active + tensor) != 0)
        grad_at, accumulator_at = tl.load(row + _GRAD), tl.load(row + _ACCUMULATOR)
        if (mode == _ACCUMULATE) & (grad_at != 0):
            inv_scale = tl.load(scalars + _UNSCALE)
            for done in range(0, wide, BLOCK):
                _add_block(
                    grad_at, accumulator_at, start + done, wide - done, inv_scale,
                    GRAD, GRAD_ELEMENT, COMPUTE, BLOCK, True,
                )  # fmt: skip
            for done in range(wide, count, BLOCK):
                _add_block(
                    grad_at, accumulator_at, start + done, count - done, inv_scale,
                    GRAD, GRAD_ELEMENT, COMPUTE, BLOCK, False,
                )  # fmt: skip
    if moves:
        memory, numbers = _memory(row), scalars_at(scalars + _FIRST)
        if EACH:
            factor = tl.load(factors + tensor)
        else:
            factor = tl.load(scalars + _FACTOR)
        decay = tl.load(scalars + _DECAY)
        decay = tl.where((tl.load(row + _FLAGS) & _EXCLUDED) != 0, decay * 0.0, decay)
        key = tensor.to(tl.uint32)
        if ROUNDED:
            key = hash32(tl.load(row + _KEY), tl.load(step_key).to(tl.uint32, bitcast=True))
        for done in range(0, wide, BLOCK):
            _block(
                memory, numbers, start + done, wide - done, factor, decay, key,
                PARAM, GRAD, PARAM_ELEMENT, GRAD_ELEMENT, COMPUTE, ACCUMULATED, LIMITED, AVERAGED, COUPLED, ROUNDED,
                BLOCK, True,
            )  # fmt: skip
        for done in range(wide, count, BLOCK):
            _block(
                memory, numbers, start + done, count - done, factor, decay, key,
                PARAM, GRAD, PARAM_ELEMENT, GRAD_ELEMENT, COMPUTE, ACCUMULATED, LIMITED, AVERAGED, COUPLED, ROUNDED,
                BLOCK, False,
            )  # fmt: skip


@triton.jit
def _squares(
    grad_at, accumulator_at, start, left, inv_scale, largest, total, shrunk, outside,
    GRAD: tl.constexpr, GRAD_ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, ACCUMULATED: tl.constexpr,
    CHECKED: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Add the squares of a block to the sums, float64 and one per element of a block."""
    if ACCUMULATED:
        grad = load_if(grad_at, start, left, GRAD_ELEMENT, BLOCK, WIDE)
    else:
        grad = load(grad_at, start, left, GRAD_ELEMENT, BLOCK, WIDE)
    grad = widen(grad, GRAD, COMPUTE) * inv_scale
    if CHECKED:
        outside += tl.where(tl.abs(grad) <= largest, 0, 1)
    if ACCUMULATED:
        grad += load(accumulator_at, start, left, COMPUTE, BLOCK, WIDE)
    value = grad.to(tl.float64)
    total += value * value
    if tl.float64 == COMPUTE:
        value = value * _SHRINK
        shrunk += value * value
    return total, shrunk, outside


@triton.jit(do_not_specialize_on_alignment=["chunks", "partials", "scale"])
def measure(
    rows, chunks, partials, counters, scale, inv_scale: tl.float64, largest: tl.float64, steps: tl.float64,
    GRAD: tl.constexpr, GRAD_ELEMENT: tl.constexpr, COMPUTE: tl.constexpr, ACCUMULATED: tl.constexpr,
    CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the gradients of a chunk once: their sum of squares, and how many are too large or not finite.

    The order of the sum is fixed by BLOCK: element by element of the blocks, then within a block.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * _CHUNK_COLUMNS
    tensor, start, count = tl.load(chunk + _TENSOR), tl.load(chunk + _START), tl.load(chunk + _COUNT).to(tl.int32)
    row = rows + tensor * _COLUMNS
    if ACCUMULATED and not CHECKED:
        calls = tl.load(counters + _CALLS)
        count = tl.where(calls % steps == steps - 1.0, count, 0)
    multiplier = tl.full((), 0.0, tl.float64) + inv_scale
    if scale is not None:
        multiplier = multiplier / tl.load(scale).to(tl.float64)
    multiplier = multiplier.to(COMPUTE)
    bound = (tl.full((), 0.0, tl.float64) + largest).to(COMPUTE)
    wide = _wide(row, count)
    grad_at, accumulator_at = tl.load(row + _GRAD), tl.load(row + _ACCUMULATOR)
    total, shrunk = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    outside = tl.zeros((BLOCK,), tl.int32)
    for done in range(0, wide, BLOCK):
        total, shrunk, outside = _squares(
            grad_at, accumulator_at, start + done, wide - done, multiplier, bound, total, shrunk, outside,
            GRAD, GRAD_ELEMENT, COMPUTE, ACCUMULATED, CHECKED, BLOCK, True,
        )  # fmt: skip
    for done in range(wide, count, BLOCK):
        total, shrunk, outside = _squares(
            grad_at, accumulator_at, start + done, count - done, multiplier, bound, total, shrunk, outside,
            GRAD, GRAD_ELEMENT, COMPUTE, ACCUMULATED, CHECKED, BLOCK, False,
        )  # fmt: skip
    own = partials + tl.program_id(0).to(tl.int64) * _PARTIALS
    whole = tl.sum(total, 0)
    tl.store(own, whole)
    if tl.float64 == COMPUTE:
        tl.store(own + 1, tl.sum(shrunk, 0))
    else:
        tl.store(own + 1, whole)  # squares of float32 do not overflow: an infinite sum is one of infinities
    tl.store(own + 2, tl.sum(outside, 0).to(tl.float64))
