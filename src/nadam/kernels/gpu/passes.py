"""The passes over memory on a GPU, compiled by Triton from the rule: one launch for all tensors of the same formats.

A launch finds its tensors through a table of addresses and one of chunks, and its scalars where `prepare` has put them,
all on the device: the host waits for nothing. A program takes one chunk. What of a tensor is aligned to 16 bytes, with
all of its state, goes 16 bytes at once; the rest of it, and a tensor that is not aligned, element by element.
"""

import triton
import triton.language as tl

from nadam.core import counters
from nadam.core.dtypes import COMPRESSED, HALF, SHRINK, SPLIT, SPLIT8
from nadam.core.scalars import Scalars
from nadam.kernels import layout as at
from nadam.kernels.gpu.compressed import load_moments, noise, store_moments
from nadam.kernels.gpu.formats import (
    hash32,
    join_bfloat16,
    load,
    narrow_bfloat16_stochastic,
    offsets,
    rest_of_bfloat16,
    round_to_24_bits,
    scalars_at,
    store,
)

CHUNK = 4096  # elements of a program
BLOCK = 1024  # elements at once: 8 for each of 128 threads, so that of two bytes each they fill 16
WARPS = 4
TILE_WARPS = 16  # of a block of moments of 8 bits: 4 elements for each of 512 threads, so that of float32 they fill 16

# A tensor's row is that of kernels/layout.py, but for the columns of layouts, since here all tensors are dense: one
# tells which of the bucket's parameters it is, the other flags.
KEY, FLAGS = at.PARAM_LAYOUT, at.GRAD_LAYOUT
ALIGNED, EXCLUDED = 1, 2  # flags: to 16 bytes; from weight decay
SKIP, ACCUMULATE, UPDATE = range(3)  # what a step does
# What `prepare` decides. The factor is that of all gradients; where each is clipped, tensors have factors of their own.
SCALARS = ("mode", "factor", *Scalars._fields)
# What `measure` gives of a chunk: sum of squares, the same of values times SHRINK, number of values that are too large.
PARTIALS = 3

_COLUMNS, _CHUNK_COLUMNS = tl.constexpr(at.COLUMNS), tl.constexpr(at.CHUNK_COLUMNS)
_TENSOR, _START, _COUNT = tl.constexpr(at.TENSOR), tl.constexpr(at.START), tl.constexpr(at.COUNT)
_PARAM, _GRAD, _EXP_AVG = tl.constexpr(at.PARAM), tl.constexpr(at.GRAD), tl.constexpr(at.EXP_AVG)
_EXP_AVG_SQ, _EMA = tl.constexpr(at.EXP_AVG_SQ), tl.constexpr(at.EMA)
_ACCUMULATOR, _REMAINDER = tl.constexpr(at.ACCUMULATOR), tl.constexpr(at.REMAINDER)
_EXP_AVG_SCALE, _EXP_AVG_SQ_SCALE = tl.constexpr(at.EXP_AVG_SCALE), tl.constexpr(at.EXP_AVG_SQ_SCALE)
_KEY, _FLAGS, _ALIGNED, _EXCLUDED = (tl.constexpr(value) for value in (KEY, FLAGS, ALIGNED, EXCLUDED))
_SKIP, _ACCUMULATE, _UPDATE = (tl.constexpr(mode) for mode in (SKIP, ACCUMULATE, UPDATE))
_MODE, _FACTOR, _INV_SCALE, _DECAY, _FIRST = (
    tl.constexpr(SCALARS.index(name)) for name in ("mode", "factor", "inv_scale", "decay", Scalars._fields[0])
)
_PARTIALS, _SHRINK = tl.constexpr(PARTIALS), tl.constexpr(SHRINK["float64"])
_SPLIT, _SPLIT8, _HALF, _COMPRESSED = (tl.constexpr(name) for name in (SPLIT, SPLIT8, HALF, COMPRESSED))
_CALLS = tl.constexpr(counters.CALLS)


@triton.jit
def _chunk(rows, chunks):
    """This program's tensor, its row, the chunk's first element, and how many there are."""
    chunk = chunks + tl.program_id(0).to(tl.int64) * _CHUNK_COLUMNS
    tensor, start, count = tl.load(chunk + _TENSOR), tl.load(chunk + _START), tl.load(chunk + _COUNT).to(tl.int32)
    return tensor, rows + tensor * _COLUMNS, start, count


@triton.jit
def _part(row, count, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Where the part of a chunk begins and ends that goes 16 bytes at once, or else the part that does not.

    So computed that the compiler sees that the border is a multiple of UNIT.
    """
    wide = count // UNIT * ((tl.load(row + _FLAGS) & _ALIGNED).to(tl.int32) * UNIT)
    if WIDE:
        return 0, wide
    else:  # noqa: RET505  # a branch of the compiler's
        return wide, count


@triton.jit(do_not_specialize_on_alignment=["chunks"])
def one_pass(
    rows, chunks, scalars, factors, active, step_key,
    PARAM: tl.constexpr, GRAD: tl.constexpr, COMPUTE: tl.constexpr, ELEMENT: tl.constexpr,
    ACCUMULATED: tl.constexpr, LIMITED: tl.constexpr, COUPLED: tl.constexpr, AVERAGED: tl.constexpr,
    KEPT: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Do with one chunk what the step does: update it, add its gradient to the accumulator, or leave it alone."""
    IN_CODES: tl.constexpr = KEPT == _COMPRESSED
    NOISY: tl.constexpr = IN_CODES or PARAM == _SPLIT8
    EXP_AVG: tl.constexpr = "bfloat16" if KEPT == _HALF else COMPUTE
    UNIT: tl.constexpr = BLOCK if IN_CODES else 8  # a group's scale is of all its elements: no block is split
    mode = tl.load(scalars + _MODE)
    tensor, row, start, count = _chunk(rows, chunks)
    grad_at, accumulator_at = tl.load(row + _GRAD), tl.load(row + _ACCUMULATOR)
    moves = mode == _UPDATE
    if ACCUMULATED:
        moves = moves & (tl.load(active + tensor) != 0)
        if (mode == _ACCUMULATE) & (grad_at != 0):
            inv_scale = tl.load(scalars + _INV_SCALE)
            for WIDE in tl.static_range(1, -1, -1):
                begin, end = _part(row, count, UNIT, WIDE)
                for done in range(begin, end, BLOCK):
                    grad = load(grad_at, start + done, end - done, GRAD, COMPUTE, BLOCK, WIDE)
                    total = load(accumulator_at, start + done, end - done, COMPUTE, COMPUTE, BLOCK, WIDE)
                    store(accumulator_at, start + done, end - done, total + grad * inv_scale, COMPUTE, BLOCK, WIDE)
    if moves:
        s = scalars_at(scalars + _FIRST)
        param_at, rest_at, ema_at = tl.load(row + _PARAM), tl.load(row + _REMAINDER), tl.load(row + _EMA)
        exp_avg_at, exp_avg_sq_at = tl.load(row + _EXP_AVG), tl.load(row + _EXP_AVG_SQ)
        if EACH:
            factor = tl.load(factors + tensor)
        else:
            factor = tl.load(scalars + _FACTOR)
        decay = tl.load(scalars + _DECAY)
        decay = tl.where((tl.load(row + _FLAGS) & _EXCLUDED) != 0, decay * 0.0, decay)
        if NOISY or KEPT == _HALF:
            key = hash32(tl.load(row + _KEY), tl.load(step_key).to(tl.uint32, bitcast=True))
        if IN_CODES:
            exp_avg_scale_at, exp_avg_sq_scale_at = tl.load(row + _EXP_AVG_SCALE), tl.load(row + _EXP_AVG_SQ_SCALE)
        for WIDE in tl.static_range(1, -1, -1):
            begin, end = _part(row, count, UNIT, WIDE)
            for done in range(begin, end, BLOCK):
                first, left = start + done, end - done
                grad = load(grad_at, first, left, GRAD, COMPUTE, BLOCK, WIDE, ACCUMULATED)
                accumulator = grad
                if ACCUMULATED:
                    accumulator = load(accumulator_at, first, left, COMPUTE, COMPUTE, BLOCK, WIDE)
                if PARAM == _SPLIT:
                    half = load(param_at, first, left, "bits", COMPUTE, BLOCK, WIDE)
                    param = join_bfloat16(half, load(rest_at, first, left, "bits", COMPUTE, BLOCK, WIDE))
                elif PARAM == _SPLIT8:
                    half = load(param_at, first, left, "bits", COMPUTE, BLOCK, WIDE)
                    rest = load(rest_at, first, left, "octets", COMPUTE, BLOCK, WIDE)
                    param = join_bfloat16(half, rest.to(tl.uint16) << 8)
                else:
                    param = load(param_at, first, left, PARAM, COMPUTE, BLOCK, WIDE)
                if IN_CODES:
                    exp_avg, exp_avg_sq = load_moments(
                        exp_avg_at, exp_avg_sq_at, exp_avg_scale_at, exp_avg_sq_scale_at, first, left, BLOCK, WIDE
                    )
                else:
                    exp_avg = load(exp_avg_at, first, left, EXP_AVG, COMPUTE, BLOCK, WIDE)
                    exp_avg_sq = load(exp_avg_sq_at, first, left, COMPUTE, COMPUTE, BLOCK, WIDE)
                ema = param
                if AVERAGED:
                    ema = load(ema_at, first, left, COMPUTE, COMPUTE, BLOCK, WIDE)
                param, exp_avg, exp_avg_sq, ema = ELEMENT(
                    param, grad, exp_avg, exp_avg_sq, ema, accumulator, factor, decay, s,
                    ACCUMULATED, LIMITED, COUPLED, AVERAGED,
                )  # fmt: skip
                if NOISY:
                    even = noise(first + offsets(BLOCK), key)
                if IN_CODES:
                    store_moments(
                        exp_avg_at, exp_avg_sq_at, exp_avg_scale_at, exp_avg_sq_scale_at, first, left,
                        exp_avg, exp_avg_sq, even, BLOCK, WIDE,
                    )  # fmt: skip
                else:
                    store(exp_avg_sq_at, first, left, exp_avg_sq, COMPUTE, BLOCK, WIDE)
                    if KEPT == _HALF:
                        chance = hash32(first + tl.arange(0, BLOCK), key)
                        half = narrow_bfloat16_stochastic(exp_avg, chance)
                        store(exp_avg_at, first, left, half, "bits", BLOCK, WIDE)
                    else:
                        store(exp_avg_at, first, left, exp_avg, COMPUTE, BLOCK, WIDE)
                if AVERAGED:
                    store(ema_at, first, left, ema, COMPUTE, BLOCK, WIDE)
                if ACCUMULATED:
                    store(accumulator_at, first, left, tl.zeros_like(accumulator), COMPUTE, BLOCK, WIDE)
                if PARAM == _SPLIT8:
                    param = round_to_24_bits(param, even)
                store(param_at, first, left, param, PARAM, BLOCK, WIDE)
                if PARAM == _SPLIT:
                    store(rest_at, first, left, rest_of_bfloat16(param), "bits", BLOCK, WIDE)
                elif PARAM == _SPLIT8:
                    store(rest_at, first, left, (rest_of_bfloat16(param) >> 8).to(tl.uint8), "octets", BLOCK, WIDE)


@triton.jit(do_not_specialize_on_alignment=["chunks", "partials", "scale"])
def measure(
    rows, chunks, partials, counters, scale, inv_scale: tl.float64, largest: tl.float64, steps: tl.float64,
    GRAD: tl.constexpr, COMPUTE: tl.constexpr, ACCUMULATED: tl.constexpr, CHECKED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Read the gradients of a chunk once: their sum of squares, and how many are too large or not finite.

    The order of the sum is fixed by BLOCK: element by element of the blocks, then within a block.
    """
    _tensor, row, start, count = _chunk(rows, chunks)
    if ACCUMULATED and not CHECKED:
        calls = tl.load(counters + _CALLS)
        count = tl.where(calls % steps == steps - 1.0, count, 0)
    multiplier = tl.full((), 0.0, tl.float64) + inv_scale
    if scale is not None:
        multiplier = multiplier / tl.load(scale).to(tl.float64)
    bound = tl.full((), 0.0, tl.float64) + largest
    if COMPUTE == "float32":
        multiplier, bound = multiplier.to(tl.float32), bound.to(tl.float32)
    grad_at, accumulator_at = tl.load(row + _GRAD), tl.load(row + _ACCUMULATOR)
    total, shrunk = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    outside = tl.zeros((BLOCK,), tl.int32)
    for WIDE in tl.static_range(1, -1, -1):
        begin, end = _part(row, count, 8, WIDE)
        for done in range(begin, end, BLOCK):
            grad = load(grad_at, start + done, end - done, GRAD, COMPUTE, BLOCK, WIDE, ACCUMULATED) * multiplier
            if CHECKED:
                outside += tl.where(tl.abs(grad) <= bound, 0, 1)
            if ACCUMULATED:
                grad += load(accumulator_at, start + done, end - done, COMPUTE, COMPUTE, BLOCK, WIDE)
            value = grad.to(tl.float64)
            total += value * value
            if COMPUTE == "float64":
                value = value * _SHRINK
                shrunk += value * value
    own = partials + tl.program_id(0).to(tl.int64) * _PARTIALS
    whole = tl.sum(total, 0)
    tl.store(own, whole)
    if COMPUTE == "float64":
        tl.store(own + 1, tl.sum(shrunk, 0))
    else:
        tl.store(own + 1, whole)  # squares of float32 do not overflow: an infinite sum is one of infinities
    tl.store(own + 2, tl.sum(outside, 0).to(tl.float64))
