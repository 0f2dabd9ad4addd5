"""The passes over memory on the CPU, compiled by Numba from the rule.

Each kernel takes a whole group of tensors at once (table.py) and works through its chunks: it draws the next one from a
counter that all threads share, so that a slow thread never holds up a fast one, and comes back to Python after
``budget`` chunks, so that a signal is answered. `measure` only reads the gradients, `accumulate` adds them up, and
`one_pass` does everything else. Only native.py calls these, and only where the machine code is not on disk.
"""

import math
from collections.abc import Callable
from typing import Any

from numba import float64, int64, njit, uint16, uint32

from nadam.core import average, gradient, rule
from nadam.core import element as elements_of
from nadam.core.rebind import rebind
from nadam.core.scalars import Scalars
from nadam.kernels.formats import (
    CASTS,
    FORMATS,
    join_bfloat16,
    narrow_bfloat16_by_chance,
    narrow_bfloat16_plain,
    rest_of_bfloat16,
    scattered,
    widen_bfloat16,
)
from nadam.kernels.memory import PIECE, access, doubles, fetch_add, fields_of, integers, pointer_to
from nadam.kernels.spans import (
    ACCUMULATOR,
    ADVANCED,
    CHUNK_COLUMNS,
    CHUNKS,
    CLOCK,
    CLOCK_SIZE,
    COLUMNS,
    COMPUTE_DTYPE,
    CONTROL,
    COUNT,
    EMA,
    EXP_AVG,
    EXP_AVG_SQ,
    EXTRA,
    GRAD,
    GRAD_LAYOUT,
    MEMBER,
    NUM_CHUNKS,
    PARAM,
    PARAM_LAYOUT,
    REMAINDER,
    ROWS,
    SHOWN,
    SPLIT,
    START,
    STOP,
    TENSOR,
    TICKET,
)

# Fused multiply-add and a shared reciprocal, nothing that assumes away NaN or infinity.
KEEP_NAN = {"contract", "nsz", "arcp"}
# A chunk that is copied out and back takes up to so many times as long; the budget is one of time.
COST_OF_STRIDED = 16
# Sums of squares may be taken in any order within a chunk: that order is the compiler's, the same on every run.
ANY_ORDER = {"contract", "nsz", "reassoc"}


halves, keys = pointer_to(uint16), pointer_to(uint32)


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


def shared(body: Callable[..., Any]) -> Any:
    """The kernel around a body that does part of a chunk: draws chunks until none is left, or ``budget`` of them.

    The thread that draws the first chunk writes ``advanced`` over ``clock``: whatever interrupts the step afterwards,
    the counters tell that something moved; and the first chunk of a tensor writes that tensor's own. A chunk is done at
    once where its tensors are dense, else in pieces.
    """

    @njit(error_model="numpy", _nrt=False)
    def kernel(block, budget):
        b = integers(block)
        control = integers(b[CONTROL])
        while budget > 0:
            ticket = fetch_add(b[CONTROL] + 8 * TICKET)
            if ticket >= b[NUM_CHUNKS] or control[STOP]:
                return
            clock, advanced = doubles(b[CLOCK]), doubles(b[ADVANCED])
            own, shown = b[CLOCK_SIZE] - 3 * b[SHOWN], b[SHOWN]
            if ticket == 0:
                for k in range(own):
                    clock[k] = advanced[k]
            chunk = integers(b[CHUNKS] + 8 * CHUNK_COLUMNS * ticket)
            row = integers(b[ROWS] + 8 * COLUMNS * chunk[TENSOR])
            if shown > 0 and chunk[START] == 0:
                for k in range(own + row[MEMBER], b[CLOCK_SIZE], shown):
                    clock[k] = advanced[k]
            param_layout, grad_layout = integers(row[PARAM_LAYOUT]), integers(row[GRAD_LAYOUT])
            dense = param_layout[0] < 0 and grad_layout[0] < 0
            budget -= 1 if dense else COST_OF_STRIDED
            done = int64(0)
            while done < chunk[COUNT]:
                count = chunk[COUNT] - done if dense else min(chunk[COUNT] - done, PIECE)
                body(ticket, chunk[TENSOR], row, param_layout, grad_layout, chunk[START] + done, count, b)
                done += count

    return kernel


def one_pass(
    param_format: str,
    grad_format: str,
    accumulated: bool,
    limited: bool,
    penalized: bool,
    averaged: bool,
    rounded: bool = False,
    rotated: bool = False,
) -> Any:
    """The kernel that updates parameters, moments and average in one pass over memory.

    Args:
        param_format: Format of the parameters; moments, accumulator and average have its compute dtype.
        grad_format: Format of the gradients.
        accumulated: As of `element.Flags`, like the following.
        limited: Likewise.
        penalized: Likewise.
        averaged: Likewise.
        rounded: Whether the first moment is kept in bfloat16, rounded by chance.
        rotated: Whether each result is written where the next operand was, in the order parameter, moments, average,
            accumulator, and the last where the parameter was; all of one format. For XLA, which may want it so.
    """
    compute, split = COMPUTE_DTYPE[param_format], param_format == SPLIT
    widen_grad, to_compute = FORMATS[grad_format].widen, CASTS[compute]
    widen, narrow = FORMATS[param_format].widen, FORMATS[param_format].narrow
    if param_format == grad_format == "bfloat16":
        # Every NaN there can be is then a widened bfloat16's or the processor's own, and those end in zeros.
        narrow = narrow_bfloat16_plain
    param_scratch, open_param, close_param = access(param_format)
    grad_scratch, open_grad, _ = access(grad_format)
    values, scalars = pointer_to(FORMATS[compute].storage), fields_of(Scalars, FORMATS[compute].storage)
    width = FORMATS[compute].width
    whole = njit(inline="always")(lambda param: param)
    read_back = njit(inline="always")(lambda param: widen(narrow(param)))
    names = {
        "update": compiled(rule.update, sqrt=math.sqrt),
        "limit": compiled(gradient.limit, minimum=minimum, maximum=maximum),
        "coupled": compiled(gradient.coupled),
        "average": compiled(average.average),
        "where": compiled(average.where),
        "stored": read_back if averaged and param_format in ("float16", "bfloat16") else whole,
    }
    element = compiled(elements_of.element, **names)

    @njit(error_model="numpy", fastmath=KEEP_NAN, _nrt=False)
    def elements(p, r, g, m, v, e, a, n, s, factor, decay, start, key):
        for i in range(n):
            grad = to_compute(widen_grad(g[i]))
            param = join_bfloat16(p[i], r[i]) if split else widen(p[i])
            old = widen_bfloat16(m[i]) if rounded else m[i]
            ema, total = e[i] if averaged else grad, a[i] if accumulated else grad
            param, first, second, ema = element(
                param, grad, old, v[i], ema, total, factor, decay, s, accumulated, limited, penalized, averaged
            )
            stored = narrow(param)
            if split:
                r[i] = rest_of_bfloat16(param, stored)
            if rotated:
                m[i], v[i], last = stored, first, second
                if averaged:
                    e[i], last = last, ema
                if accumulated:
                    a[i], last = last, to_compute(0.0)
                p[i] = last
                continue
            p[i], v[i] = stored, second
            m[i] = narrow_bfloat16_by_chance(first, scattered(start + i, key)) if rounded else first
            if averaged:
                e[i] = ema
            if accumulated:
                a[i] = to_compute(0.0)

    @njit(error_model="numpy", _nrt=False)
    def body(ticket, tensor, row, param_layout, grad_layout, start, count, b):
        p = open_param(row[PARAM], param_layout, start, count, param_scratch())
        r = halves(row[REMAINDER] + start * 2)
        g = open_grad(row[GRAD], grad_layout, start, count, grad_scratch())
        m = halves(row[EXP_AVG] + start * 2) if rounded else values(row[EXP_AVG] + start * width)
        v = values(row[EXP_AVG_SQ] + start * width)
        e, a = values(row[EMA] + start * width), values(row[ACCUMULATOR] + start * width)
        factor, decay = values(b[EXTRA])[tensor], values(b[EXTRA + 1])[tensor]
        key = keys(b[EXTRA + 3])[tensor] if rounded else uint32(0)
        elements(p, r, g, m, v, e, a, count, scalars(b[EXTRA + 2]), factor, decay, start, key)
        close_param(p, row[PARAM], param_layout, start, count)

    return shared(body)


def accumulate(grad_format: str, compute: str) -> Any:
    """The kernel that adds unscaled gradients to the accumulators."""
    widen_grad, to_compute = FORMATS[grad_format].widen, CASTS[compute]
    grad_scratch, open_grad, _ = access(grad_format)
    values, width = pointer_to(FORMATS[compute].storage), FORMATS[compute].width

    @njit(error_model="numpy", fastmath=KEEP_NAN, _nrt=False)
    def elements(g, a, n, unscale):
        for i in range(n):
            a[i] += to_compute(widen_grad(g[i])) * unscale

    @njit(error_model="numpy", _nrt=False)
    def body(ticket, tensor, row, param_layout, grad_layout, start, count, b):
        g = open_grad(row[GRAD], grad_layout, start, count, grad_scratch())
        elements(g, values(row[ACCUMULATOR] + start * width), count, values(b[EXTRA])[0])

    return shared(body)


def measure(grad_format: str, compute: str, accumulated: bool, counted: bool) -> Any:
    """The kernel that reads the gradients once: the sum of squares of each chunk.

    The sums are float64, so the squares of float32 and half gradients cannot overflow.

    Args:
        grad_format: Format of the gradients.
        compute: What they are widened to.
        accumulated: Whether to add the accumulator.
        counted: Whether to scale the values, and to count those of the gradient itself that are too large, too. Without
            it and the accumulator, the gradient is not even unscaled: one multiplication of the sum does that.
    """
    widen_grad, to_compute = FORMATS[grad_format].widen, CASTS[compute]
    grad_scratch, open_grad, _ = access(grad_format)
    values, width = pointer_to(FORMATS[compute].storage), FORMATS[compute].width

    @njit(error_model="numpy", fastmath=ANY_ORDER, _nrt=False)
    def elements(g, a, n, unscale, largest, scale):
        total, outside = 0.0, 0
        for begin in range(0, n, PIECE):  # the order of the sum is then the same whether the tensor is dense or not
            subtotal = 0.0
            for i in range(begin, min(begin + PIECE, n)):
                grad = to_compute(widen_grad(g[i]))
                if accumulated or counted:
                    grad = grad * unscale
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
        g = open_grad(row[GRAD], grad_layout, start, count, grad_scratch())
        a, s = values(row[ACCUMULATOR] + start * width), values(b[EXTRA])
        total, outside = elements(g, a, count, s[0], s[1], doubles(b[EXTRA + 1])[0])
        doubles(b[EXTRA + 2])[ticket] += total
        integers(b[EXTRA + 3])[ticket] += outside

    return shared(body)
