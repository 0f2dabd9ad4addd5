"""The CPU's passes as functions that XLA's compiled programs call: handlers of its foreign function interface.

XLA makes a loop of its own for each of the three results of the rule: 44 bytes of memory traffic for a float32
parameter where one pass has 28. A handler finds the operands' addresses in the structs of the interface's C headers
(xla/ffi/api/c_api.h, shipped with jaxlib), fills in the same tables as `group.py` and runs the same kernels, on XLA's
own threads. `machine_code.py` makes it callable from C.
"""

import math
from typing import Any

from llvmlite import ir
from numba import float64, njit, types
from numba.extending import intrinsic

from nadam.core.dtypes import COMPRESSED, WIDE
from nadam.kernels import layout as at
from nadam.kernels.cpu import passes
from nadam.kernels.cpu.formats import CASTS, FORMATS
from nadam.kernels.cpu.memory import atomic_add, doubles, integers, pointer_to

# The structs of the interface, by words of 8 bytes.
FRAME_SIZE, EXTENSION, API, CONTEXT, STAGE, NUM_ARGS, ARGS, RETS, FUTURE = 0, 1, 2, 3, 4, 7, 9, 14, 21
EXTENSION_TYPE, METADATA = 1, 3
METADATA_VERSION, API_VERSION, METADATA_TRAITS = 3, 4, 4
FIRST_VERSION = 1 << 32  # major in the lower half of the word, minor in the upper
SCHEDULE, NUM_THREADS, FUTURE_CREATE, FUTURE_SET_AVAILABLE = 17, 18, 19, 20
DATA, RANK, DIMS = 3, 4, 5
EXECUTE = 3
# The arguments of its functions, with their sizes in bytes.
SCHEDULE_SIZE, NUM_THREADS_SIZE, FUTURE_SIZE = 40, 32, 24

# The scratch memory of a call, by words: the kernel's block, what its threads share, how many are still at work, what
# they need to report the end, arguments for XLA's functions, where results go, a dense layout; then rows, chunks, sums.
BLOCK, SHARED, WORKERS, REPORT, CALL, RESULT, COUNTED, SCALE, DENSE, TABLES = 0, 12, 14, 16, 18, 26, 28, 29, 30, 32
WHOLE = 1 << 62  # a budget that lasts: Python gets no turn inside a compiled program
WORTH_SHARING = 1 << 18  # elements; XLA's threads wake up sooner than Python's
MAX_THREADS = 64

small_integers = pointer_to(types.int32)


@intrinsic
def call(typing: Any, function: Any, argument: Any) -> Any:
    """Call a C function by its address, with an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        target = builder.inttoptr(args[0], ir.PointerType(ir.FunctionType(word, [word])))
        return builder.call(target, [args[1]])

    return types.int64(types.int64, types.int64), build


leave = atomic_add(-1, "acq_rel")  # after all that was written before


@njit
def answered(frame):
    """Whether a call asks for something else than to execute; it is answered then."""
    f = integers(frame)
    if f[EXTENSION] != 0 and small_integers(f[EXTENSION] + 8 * EXTENSION_TYPE)[0] == 1:
        metadata = integers(integers(f[EXTENSION])[METADATA])
        # Older releases ask without their table of functions; their version is 0.1.
        metadata[METADATA_VERSION] = integers(f[API])[API_VERSION] if f[API] != 0 else FIRST_VERSION
        small_integers(integers(f[EXTENSION])[METADATA] + 8 * METADATA_TRAITS)[0] = 0
        return True
    return small_integers(frame + 8 * STAGE)[0] != EXECUTE


@njit
def data(buffers, i):
    """The address of an operand's or result's memory."""
    return integers(integers(buffers)[i])[DATA]


@njit
def size(buffers, i):
    """The number of its elements."""
    buffer = integers(integers(buffers)[i])
    total = 1
    for d in range(buffer[RANK]):
        total *= integers(buffer[DIMS])[d]
    return total


@njit
def tables(scratch, count):
    """Prepare the block for so many tensors; gives its rows, which are still empty."""
    s = integers(scratch)
    for i in range(TABLES + at.COLUMNS * count):
        s[i] = 0
    s[DENSE] = -1
    s[BLOCK + at.CONTROL] = scratch + 8 * SHARED
    s[BLOCK + at.ROWS] = scratch + 8 * TABLES
    s[BLOCK + at.CHUNKS] = scratch + 8 * (TABLES + at.COLUMNS * count)
    for t in range(count):
        row = integers(s[BLOCK + at.ROWS] + 8 * at.COLUMNS * t)
        row[at.PARAM_LAYOUT] = row[at.GRAD_LAYOUT] = scratch + 8 * DENSE
    return s[BLOCK + at.ROWS]


@njit
def chunk(s, i):
    """The words of a chunk."""
    return integers(s[BLOCK + at.CHUNKS] + 8 * at.CHUNK_COLUMNS * i)


@njit
def cut(scratch, tensor, elements):
    """Add a tensor's chunks; gives its elements."""
    s = integers(scratch)
    for start in range(0, elements, at.CHUNK):
        c = chunk(s, s[BLOCK + at.NUM_CHUNKS])
        c[at.TENSOR], c[at.START], c[at.COUNT] = tensor, start, min(at.CHUNK, elements - start)
        s[BLOCK + at.NUM_CHUNKS] += 1
    return elements


@njit
def ask(function, scratch, size, first, second, third):
    """Call a function of XLA's with a struct of arguments; gives 0 where it succeeds."""
    arguments = integers(scratch + 8 * CALL)
    arguments[0], arguments[1], arguments[2], arguments[3], arguments[4] = size, 0, first, second, third
    return call(function, scratch + 8 * CALL)


@njit
def share_out(frame, task, scratch, elements):
    """Have XLA's threads help; the call then ends with the last of them."""
    f, s = integers(frame), integers(scratch)
    api, threads = integers(f[API]), scratch + 8 * (CALL + 5)
    s[WORKERS] = 1
    if elements < WORTH_SHARING or ask(api[NUM_THREADS], scratch, NUM_THREADS_SIZE, f[CONTEXT], threads, 0) != 0:
        return
    helpers = min(integers(threads)[0], s[BLOCK + at.NUM_CHUNKS], MAX_THREADS) - 1
    if helpers < 1 or ask(api[FUTURE_CREATE], scratch, FUTURE_SIZE, 0, 0, 0) != 0:
        return
    f[FUTURE] = s[REPORT + 1] = s[CALL + 2]
    s[REPORT] = api[FUTURE_SET_AVAILABLE]
    s[WORKERS] = helpers + 1
    for _ in range(helpers):
        if ask(api[SCHEDULE], scratch, SCHEDULE_SIZE, f[CONTEXT], task, scratch) != 0:
            leave(scratch + 8 * WORKERS)


def handler(kernel: Any, fill: Any, end: Any) -> Any:
    """A handler around a kernel: called by XLA with a call's frame, or, on one of its threads, with scratch memory."""

    @njit(error_model="numpy", _nrt=False)
    def work(scratch):
        kernel(scratch + 8 * BLOCK, WHOLE)
        if leave(scratch + 8 * WORKERS) == 1:
            end(scratch)
            s = integers(scratch)
            if s[REPORT] != 0:
                ask(s[REPORT], scratch, FUTURE_SIZE, s[REPORT + 1], 0, 0)

    @njit(error_model="numpy", _nrt=False)
    def entry(given, task):
        if task == 0:
            work(given)
        elif not answered(given):
            f = integers(given)
            scratch = data(f[RETS], 0)
            elements = fill(given, scratch)
            share_out(given, task, scratch, elements)
            work(scratch)

    return entry


def one_pass(
    param_format: str,
    grad_format: str,
    accumulated: bool,
    limited: bool,
    penalized: bool,
    averaged: bool,
    kept: str = WIDE,
) -> Any:
    """The handler that updates parameters, moments and average in one pass; in place, so results alias operands.

    Operands: the fields of `scalars.Scalars`; a factor for each gradient; a decay for each parameter; a key for each,
    of moments that are compressed; gradients, parameters, both moments, averages, accumulators and scales of both
    moments if there are any; perhaps one more, only to be waited for. Results: scratch memory, then all that was given
    from the parameters on. The arguments are those of `passes.one_pass`.
    """
    compressed = kept == COMPRESSED
    columns = (at.PARAM, at.EXP_AVG, at.EXP_AVG_SQ, *([at.EMA] * averaged), *([at.ACCUMULATOR] * accumulated))
    columns += (at.EXP_AVG_SCALE, at.EXP_AVG_SQ_SCALE) * compressed
    state, before = len(columns), 3 + compressed

    @njit
    def fill(frame, scratch):
        args, rets = integers(frame)[ARGS], integers(frame)[RETS]
        count = (integers(frame)[NUM_ARGS] - before) // (1 + state)
        rows, elements = tables(scratch, count), 0
        block = integers(scratch + 8 * BLOCK)
        block[at.EXTRA], block[at.EXTRA + 1], block[at.EXTRA + 2] = data(args, 1), data(args, 2), data(args, 0)
        if compressed:
            block[at.EXTRA + 3] = data(args, 3)
        for t in range(count):
            row = integers(rows + 8 * at.COLUMNS * t)
            row[at.GRAD] = data(args, before + t)
            for k in range(state):
                row[columns[k]] = data(rets, 1 + k * count + t)
            elements += cut(scratch, t, size(args, before + t))
        return elements

    @njit
    def end(scratch):
        pass

    kernel = passes.one_pass(param_format, grad_format, accumulated, limited, penalized, averaged, kept)
    return handler(kernel, fill, end)


def measure(grad_format: str, compute: str, accumulated: bool, counted: bool) -> Any:
    """The handler that reads the gradients once.

    Operands: what multiplies the gradients, the largest magnitude that is not counted, what multiplies the result;
    gradients; accumulators if there are any. Results: scratch memory, the norm of each gradient, how many values are
    too large. The arguments are those of `passes.measure`.
    """
    values, to_compute = pointer_to(FORMATS[compute].storage), CASTS[compute]

    @njit
    def fill(frame, scratch):
        args, rets = integers(frame)[ARGS], integers(frame)[RETS]
        count = (integers(frame)[NUM_ARGS] - 1) // (1 + accumulated)
        rows, elements = tables(scratch, count), 0
        for t in range(count):
            row = integers(rows + 8 * at.COLUMNS * t)
            row[at.GRAD] = data(args, 1 + t)
            if accumulated:
                row[at.ACCUMULATOR] = data(args, 1 + count + t)
            elements += cut(scratch, t, size(args, 1 + t))
        s = integers(scratch)
        chunks, s[COUNTED], s[RESULT], s[RESULT + 1] = s[BLOCK + at.NUM_CHUNKS], count, data(rets, 1), data(rets, 2)
        sums = s[BLOCK + at.CHUNKS] + 8 * at.CHUNK_COLUMNS * chunks
        for i in range(2 * chunks):
            integers(sums)[i] = 0
        doubles(scratch + 8 * SCALE)[0] = float64(values(data(args, 0))[2])
        s[BLOCK + at.EXTRA], s[BLOCK + at.EXTRA + 1] = data(args, 0), scratch + 8 * SCALE
        s[BLOCK + at.EXTRA + 2], s[BLOCK + at.EXTRA + 3] = sums, sums + 8 * chunks
        return elements

    @njit
    def end(scratch):
        s = integers(scratch)
        norms, outside = values(s[RESULT]), small_integers(s[RESULT + 1])
        sums, counts = doubles(s[BLOCK + at.EXTRA + 2]), integers(s[BLOCK + at.EXTRA + 3])
        i, too_large = 0, 0
        for t in range(s[COUNTED]):
            total = 0.0
            while i < s[BLOCK + at.NUM_CHUNKS] and chunk(s, i)[at.TENSOR] == t:
                total += sums[i]
                too_large += counts[i] != 0
                i += 1
            norms[t] = to_compute(math.sqrt(total))
        outside[0] = too_large

    return handler(passes.measure(grad_format, compute, accumulated, counted), fill, end)
