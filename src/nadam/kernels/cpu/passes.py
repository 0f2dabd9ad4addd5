"""The passes over memory on the CPU, compiled by Numba from the rule.

Each kernel takes a whole group of tensors at once (group.py) and works through its chunks: it draws the next one from a
counter that all threads share, so that a slow thread never holds up a fast one, and comes back to Python after
``budget`` chunks, so that a signal is answered. `measure` only reads the gradients, `accumulate` adds them up, and
`one_pass` does everything else. Only machine_code.py calls these, and only where the machine code is not on disk.
"""

import math
from collections.abc import Callable
from typing import Any

from numba import float64, int64, njit, uint8, uint16, uint32

from nadam.core.compressed import BLOCK, LANES
from nadam.core.dtypes import COMPRESSED, COMPUTE_DTYPE, HALF, SPLIT, SPLIT8, WIDE
from nadam.core.rebind import bind_element, rebind
from nadam.core.scalars import Scalars, where
from nadam.kernels import layout as at
from nadam.kernels.cpu.compressed import noise, of_blocks
from nadam.kernels.cpu.formats import (
    CASTS,
    FORMATS,
    KEEP_NAN,
    REMAINDERS,
    hash32,
    narrow_bfloat16_plain,
    narrow_bfloat16_stochastic,
    split_8_bits_plain,
    widen_bfloat16,
)
from nadam.kernels.cpu.hints import AHEAD, WORTH_PREFETCHING, apart, prefetch, prefetch_to_write, wide_vectors
from nadam.kernels.cpu.memory import PIECE, access, doubles, fetch_add, fields_of, integers, pointer_to

# A chunk that is copied out and back takes up to so many times as long; the budget is one of time.
COST_OF_STRIDED = 16
# Sums of squares may be taken in any order within a chunk: that order is the compiler's, the same on every run.
ANY_ORDER = {"contract", "nsz", "reassoc"}


octets, halves, keys = pointer_to(uint8), pointer_to(uint16), pointer_to(uint32)


@njit(inline="always")
def minimum(value, bound):
    """The smaller one; a NaN value stays."""
    return bound if bound < value else value


@njit(inline="always")
def maximum(value, bound):
    """The larger one; a NaN value stays."""
    return bound if bound > value else value


def compiled(function: Callable[..., Any], **names: Any) -> Any:
    """A function of the core for the loops here."""
    return njit(rebind(function, **names), inline="always", fastmath=KEEP_NAN)


def shared(body: Callable[..., Any], in_pieces: bool = False) -> Any:
    """The kernel around a body that does part of a chunk: draws chunks until none is left, or ``budget`` of them.

    The thread that draws the first chunk writes the counters after the step over the current ones, and the first chunk
    of a tensor that tensor's own: whatever interrupts the step, they tell what has moved. A chunk is done at once where
    its tensors are dense, else in pieces.
    """

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b = integers(block)
        control = integers(b[at.CONTROL])
        while budget > 0:
            ticket = fetch_add(b[at.CONTROL] + 8 * at.TICKET)
            if ticket >= b[at.NUM_CHUNKS] or control[at.STOP]:
                return
            counters, after = doubles(b[at.COUNTERS]), doubles(b[at.NEXT_COUNTERS])
            own, shown = b[at.NUM_COUNTERS] - 3 * b[at.SHOWN], b[at.SHOWN]
            if ticket == 0:
                for k in range(own):
                    counters[k] = after[k]
            chunk = integers(b[at.CHUNKS] + 8 * at.CHUNK_COLUMNS * ticket)
            row = integers(b[at.ROWS] + 8 * at.COLUMNS * chunk[at.TENSOR])
            if shown > 0 and chunk[at.START] == 0:
                for k in range(own + row[at.MEMBER], b[at.NUM_COUNTERS], shown):
                    counters[k] = after[k]
            param_layout, grad_layout = integers(row[at.PARAM_LAYOUT]), integers(row[at.GRAD_LAYOUT])
            dense = param_layout[0] < 0 and grad_layout[0] < 0
            budget -= 1 if dense else COST_OF_STRIDED
            at_once = dense and not in_pieces
            done = int64(0)
            while done < chunk[at.COUNT]:
                count = chunk[at.COUNT] - done if at_once else min(chunk[at.COUNT] - done, PIECE)
                body(ticket, chunk[at.TENSOR], row, param_layout, grad_layout, chunk[at.START] + done, count, b)
                done += count

    return kernel


def one_pass(
    param_format: str,
    grad_format: str,
    accumulated: bool,
    limited: bool,
    penalized: bool,
    averaged: bool,
    kept: str = WIDE,
) -> Any:
    """The kernel that updates parameters, moments and average in one pass over memory.

    Accumulator and average have the compute dtype of ``param_format``; moments too, unless they are ``kept`` in less,
    rounded stochastically. The flags are `element.Flags`.
    """
    compute, split = COMPUTE_DTYPE[param_format], param_format in REMAINDERS
    halved, compressed, noisy = kept == HALF, kept == COMPRESSED, kept == COMPRESSED or param_format == SPLIT8
    widen_grad, to_compute = FORMATS[grad_format].widen, CASTS[compute]
    widen, narrow = FORMATS[param_format].widen, FORMATS[param_format].narrow
    if param_format == grad_format == "bfloat16":
        # Every NaN there can be is then a widened bfloat16's or the processor's own, and those end in zeros.
        narrow = narrow_bfloat16_plain
    remainder = REMAINDERS.get(param_format, REMAINDERS[SPLIT])
    join, parted, remainders = remainder.join, remainder.split, pointer_to(remainder.storage)
    if param_format == SPLIT8 and FORMATS[grad_format].width == 2:
        parted = split_8_bits_plain  # a NaN is then one of these gradients, widened, or the processor's own
    param_scratch, open_param, close_param = access(param_format)
    grad_scratch, open_grad, _ = access(grad_format)
    values, scalars = pointer_to(FORMATS[compute].storage), fields_of(Scalars, FORMATS[compute].storage)
    width, rest_width = FORMATS[compute].width, remainder.width
    p_width, g_width, m_width = FORMATS[param_format].width, FORMATS[grad_format].width, 2 if halved else width
    whole = njit(inline="always")(lambda param: param)
    read_back = njit(inline="always")(lambda param: widen(narrow(param)))
    stored_as = read_back if averaged and param_format in ("float16", "bfloat16") else whole
    names = bind_element(compiled, sqrt=math.sqrt, minimum=minimum, maximum=maximum, where=compiled(where))
    element = names["element"](stored_as)

    @njit(inline="always")
    def advance(i, old, squares, p, r, g, e, a, s, factor, decay, bits):
        grad = to_compute(widen_grad(g[i]))
        param = join(p[i], r[i]) if split else widen(p[i])
        ema, total = e[i] if averaged else grad, a[i] if accumulated else grad
        param, first, second, ema = element(
            param, grad, old, squares, ema, total, factor, decay, s, accumulated, limited, penalized, averaged
        )
        if split:
            p[i], r[i] = parted(param, bits)
        else:
            p[i] = narrow(param)
        if averaged:
            e[i] = ema
        if accumulated:
            a[i] = to_compute(0.0)
        return first, second

    @njit(error_model="numpy", fastmath=KEEP_NAN, _nrt=False)
    def elements(p, r, g, m, v, e, a, n, s, factor, decay, start, key, even_key, descriptor):
        apart()
        if halved or split:
            wide_vectors()
        soon = start + AHEAD
        p_next, g_next = descriptor[at.PARAM] + soon * p_width, descriptor[at.GRAD] + soon * g_width
        m_next, v_next = descriptor[at.EXP_AVG] + soon * m_width, descriptor[at.EXP_AVG_SQ] + soon * width
        e_next = descriptor[at.EMA] + soon * width
        row, last = 0, n - AHEAD if n >= WORTH_PREFETCHING else 0  # what follows the chunk may be no memory at all
        while row < n:
            end = row + LANES
            if end <= last:
                prefetch_to_write(p_next + row * p_width, LANES * p_width)
                prefetch(g_next + row * g_width, LANES * g_width)
                prefetch_to_write(m_next + row * m_width, LANES * m_width)
                prefetch_to_write(v_next + row * width, LANES * width)
                if averaged:
                    prefetch_to_write(e_next + row * width, LANES * width)
            else:
                end = n
            for i in range(row, end):
                old = widen_bfloat16(m[i]) if halved else m[i]
                bits = noise(i, even_key) if noisy else uint32(0)
                first, second = advance(i, old, v[i], p, r, g, e, a, s, factor, decay, bits)
                m[i] = narrow_bfloat16_stochastic(first, hash32(start + i, key)) if halved else first
                v[i] = second
            row = end

    whole_block, part_of_block = of_blocks(advance, p_width, g_width)

    @njit(error_model="numpy", _nrt=False)
    def body(ticket, tensor, row, param_layout, grad_layout, start, count, b):
        p = open_param(row[at.PARAM], param_layout, start, count, param_scratch())
        r = remainders(row[at.REMAINDER] + start * rest_width)
        g = open_grad(row[at.GRAD], grad_layout, start, count, grad_scratch())
        e, a = values(row[at.EMA] + start * width), values(row[at.ACCUMULATOR] + start * width)
        factor, decay = values(b[at.EXTRA])[tensor], values(b[at.EXTRA + 1])[tensor]
        key = keys(b[at.EXTRA + 3])[tensor] if halved or noisy else uint32(0)
        even_key = noise(start, key)  # so that within the loops indices are small
        s = scalars(b[at.EXTRA + 2])
        if compressed:
            m, v = octets(row[at.EXP_AVG] + start), octets(row[at.EXP_AVG_SQ] + start)
            group = start // BLOCK * LANES
            m_scales, v_scales = octets(row[at.EXP_AVG_SCALE] + group), octets(row[at.EXP_AVG_SQ_SCALE] + group)
            args = p, r, g, m, v, m_scales, v_scales, e, a, count, s, factor, decay, even_key, row, start
            if count == BLOCK:
                whole_block(*args)
            else:
                part_of_block(*args)
        else:
            m = (halves if halved else values)(row[at.EXP_AVG] + start * m_width)
            v = values(row[at.EXP_AVG_SQ] + start * width)
            elements(p, r, g, m, v, e, a, count, s, factor, decay, start, key, even_key, row)
        close_param(p, row[at.PARAM], param_layout, start, count)

    return shared(body, compressed)


def accumulate(grad_format: str, compute: str) -> Any:
    """The kernel that adds unscaled gradients to the accumulators."""
    widen_grad, to_compute = FORMATS[grad_format].widen, CASTS[compute]
    grad_scratch, open_grad, _ = access(grad_format)
    values, width = pointer_to(FORMATS[compute].storage), FORMATS[compute].width

    @njit(error_model="numpy", fastmath=KEEP_NAN, _nrt=False)
    def elements(g, a, n, inv_scale):
        for i in range(n):
            a[i] += to_compute(widen_grad(g[i])) * inv_scale

    @njit(error_model="numpy", _nrt=False)
    def body(ticket, tensor, row, param_layout, grad_layout, start, count, b):
        g = open_grad(row[at.GRAD], grad_layout, start, count, grad_scratch())
        elements(g, values(row[at.ACCUMULATOR] + start * width), count, values(b[at.EXTRA])[0])

    return shared(body)


def measure(grad_format: str, compute: str, accumulated: bool, counted: bool) -> Any:
    """The kernel that reads the gradients once: the sum of squares of each chunk.

    The sums are float64, so the squares of float32 and half gradients cannot overflow.
    """
    widen_grad, to_compute = FORMATS[grad_format].widen, CASTS[compute]
    grad_scratch, open_grad, _ = access(grad_format)
    values, width, g_width = pointer_to(FORMATS[compute].storage), FORMATS[compute].width, FORMATS[grad_format].width

    @njit(error_model="numpy", fastmath=ANY_ORDER, _nrt=False)
    def elements(g, a, n, inv_scale, largest, scale, g_next):
        total, outside = 0.0, 0
        for begin in range(0, n, PIECE):  # the order of the sum is then the same whether the tensor is dense or not
            if begin + 2 * PIECE <= n:
                prefetch(g_next + begin * g_width, PIECE * g_width)
            subtotal = 0.0
            for i in range(begin, min(begin + PIECE, n)):
                grad = to_compute(widen_grad(g[i]))
                if accumulated or counted:
                    grad = grad * inv_scale
                if counted:
                    outside += not (abs(grad) <= largest)
                if accumulated:
                    grad += a[i]
                value = float64(grad)
                if counted:
                    value *= scale
                subtotal += value * value
            total += subtotal
        return total, outside

    @njit(error_model="numpy", _nrt=False)
    def body(ticket, tensor, row, param_layout, grad_layout, start, count, b):
        g = open_grad(row[at.GRAD], grad_layout, start, count, grad_scratch())
        a, s = values(row[at.ACCUMULATOR] + start * width), values(b[at.EXTRA])
        g_next = row[at.GRAD] + (start + PIECE) * g_width
        total, outside = elements(g, a, count, s[0], s[1], doubles(b[at.EXTRA + 1])[0], g_next)
        doubles(b[at.EXTRA + 2])[ticket] += total
        integers(b[at.EXTRA + 3])[ticket] += outside

    return shared(body)
