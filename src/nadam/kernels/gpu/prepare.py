"""What a step does, decided on the device: partial sums, loss scale, learning rate and counters -> the step's scalars.

So the host never asks how a step went, and a CUDA graph may skip, accumulate or update at each replay. All is in
float64, by the functions of the core, and the counters lie as in `core.counters.Counters`.
"""

import triton
import triton.language as tl

from nadam.core import counters
from nadam.core.dtypes import SMALLEST_NORMAL
from nadam.core.scalars import Scalars, Settings
from nadam.kernels.gpu.formats import INFINITY, clamp_eps, clip_factor, global_clip_factor, hash32, step_scalars
from nadam.kernels.gpu.passes import (
    _ACCUMULATE,
    _COLUMNS,
    _FACTOR,
    _FIRST,
    _GRAD,
    _KEY,
    _MODE,
    _PARTIALS,
    _SHRINK,
    _SKIP,
    _UPDATE,
)

WARPS = 8
BLOCK = 2048  # partial sums, or tensors, at once
# What `prepare` reports of a step: the mode, updates so far, learning rate, norm, factor of clipping, skipped calls.
REPORT = ("mode", "step", "learning_rate", "grad_norm", "clip_factor", "skipped_steps")

_REPORTED = tl.constexpr(len(REPORT))
_COUNT, _EPS = tl.constexpr(len(Scalars._fields)), tl.constexpr(Scalars._fields.index("eps"))
_CALLS, _PRODUCT, _SKIPPED, _SEEN = (
    tl.constexpr(i) for i in (counters.CALLS, counters.MOMENTUM_PRODUCT, counters.SKIPPED, counters.SEEN)
)
_SMALLEST32, _SMALLEST64 = (tl.constexpr(SMALLEST_NORMAL[name]) for name in ("float32", "float64"))


@triton.jit
def _put(scalars32, scalars64, index, value, in_float32):
    tl.store(scalars32 + index, in_float32.to(tl.float32))
    tl.store(scalars64 + index, value)


@triton.jit
def _wide(value):
    """A number or a scalar of any dtype as a float64."""
    return tl.full((), 0.0, tl.float64) + value


@triton.jit
def _norm(total, shrunk):
    """The norm that sums of squares give; the shrunk ones where the plain ones have overflowed."""
    return tl.where(total == INFINITY, tl.sqrt(shrunk) / _SHRINK, tl.sqrt(total))


@triton.jit
def _sums(entries, count, BLOCK: tl.constexpr):
    """Entries of PARTIALS columns added up, in an order that depends on their number only."""
    offsets = tl.arange(0, BLOCK)
    total, shrunk = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    outside = tl.zeros((BLOCK,), tl.float64)
    for done in range(0, count, BLOCK):
        there = offsets < count - done
        pointers = entries + (done + offsets).to(tl.int64) * _PARTIALS
        total += tl.load(pointers, mask=there, other=0.0)
        shrunk += tl.load(pointers + 1, mask=there, other=0.0)
        outside += tl.load(pointers + 2, mask=there, other=0.0)
    return tl.sum(total, 0), tl.sum(shrunk, 0), tl.sum(outside, 0)


@triton.jit(do_not_specialize_on_alignment=["partials", "entries"])
def sums(partials, ends, entries, BLOCK: tl.constexpr):
    """The partial sums of one tensor added up."""
    tensor = tl.program_id(0)
    begin, end = tl.load(ends + tensor), tl.load(ends + tensor + 1)
    total, shrunk, outside = _sums(partials + begin * _PARTIALS, (end - begin).to(tl.int32), BLOCK)
    own = entries + tensor * _PARTIALS
    tl.store(own, total)
    tl.store(own + 1, shrunk)
    tl.store(own + 2, outside)


# Not compiled anew for each number of tensors, and a 1 not as a constant.
@triton.jit(
    do_not_specialize=["tensors", "count", "seed"],
    do_not_specialize_on_alignment=["entries", "own_entries", "report", "found", "scale", "lr_at"],
)
def prepare(
    counters, rows, entries, own_entries, scalars32, scalars64, factors32, factors64, active, key, report,
    found, scale, lr_at, tensors, count,
    inv_scale: tl.float64, steps: tl.float64, lr: tl.float64, beta1: tl.float64, beta2: tl.float64, eps: tl.float64,
    momentum_decay: tl.float64, weight_decay: tl.float64, clip: tl.float64, ema_momentum: tl.float64, sign: tl.float64,
    seed: tl.int64,
    MEASURED: tl.constexpr, EACH: tl.constexpr, GLOBAL: tl.constexpr, COUPLED: tl.constexpr, ADAM: tl.constexpr,
    ACCUMULATED: tl.constexpr, FREQUENCY: tl.constexpr, ROUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Decide what this step does, write its scalars, and advance the counters; one program."""
    calls, skipped = tl.load(counters + _CALLS), tl.load(counters + _SKIPPED)
    product = tl.load(counters + _PRODUCT)
    position = calls % steps
    step = (calls - position) / steps + 1.0
    updating = position == steps - 1.0
    rate = _wide(lr)
    if lr_at is not None:
        rate = tl.load(lr_at).to(tl.float64)
        # What cannot be refused here is not silent. (As a global name, NaN would never be what Triton compiled it as.)
        rate = tl.where((rate >= 0.0) & (rate < INFINITY), rate, float("nan"))
    multiplier = _wide(inv_scale)
    if scale is not None:
        multiplier = multiplier / tl.load(scale).to(tl.float64)
    passed = calls == calls
    if found is not None:
        passed = passed & (tl.load(found) == 0)
    norm = _wide(0.0)
    if MEASURED:
        total, shrunk, outside = _sums(entries, count, BLOCK)
        norm = _norm(total, shrunk) / steps
        passed = passed & (outside == 0)

    factor = _wide(1.0)
    if GLOBAL:
        factor = global_clip_factor(norm, _wide(clip))
    spread = sign / _wide(steps)
    if not ACCUMULATED:
        spread = sign * multiplier

    settings = Settings(
        rate, _wide(beta1), _wide(beta2), _wide(eps), _wide(momentum_decay), _wide(weight_decay), COUPLED,
        ADAM, _wide(clip), _wide(ema_momentum), FREQUENCY,
    )  # fmt: skip
    s, next_product = step_scalars(settings, step, step, product, multiplier, _wide(_SMALLEST64))
    for i in tl.static_range(_COUNT):
        value = _wide(s[i])
        _put(
            scalars32, scalars64, _FIRST + i, value, clamp_eps(value, value, _wide(_SMALLEST32)) if i == _EPS else value
        )
    _put(scalars32, scalars64, _FACTOR, spread * factor, spread * factor)
    mode = _wide(tl.where(passed, tl.where(updating, _UPDATE, _ACCUMULATE), _SKIP))
    _put(scalars32, scalars64, _MODE, mode, mode)
    if ROUNDED:
        tl.store(key, hash32(step.to(tl.int64), seed.to(tl.uint32)).to(tl.int32, bitcast=True))

    offsets = tl.arange(0, BLOCK)
    smallest, zeros = tl.full((BLOCK,), 1.0, tl.float64), tl.zeros((BLOCK,), tl.float64)
    # How many tensors are counted, and moved: all or none.
    counted, moved = tl.where(passed, tensors, 0), tl.where(passed & updating, tensors, 0)
    kept_seen = tl.where(updating, 0.0, 1.0).to(tl.float64)
    for done in range(0, tensors, BLOCK):
        tensor = done + offsets
        there = tensor < tensors
        if EACH:
            pointers = own_entries + tensor * _PARTIALS
            plain, small_ones = tl.load(pointers, mask=there, other=0.0), tl.load(pointers + 1, mask=there, other=0.0)
            own = clip_factor(_norm(plain, small_ones) / steps, _wide(clip))
            smallest = tl.minimum(smallest, own)
            tl.store(factors32 + tensor, (own * spread).to(tl.float32), mask=there)
            tl.store(factors64 + tensor, own * spread, mask=there)
        own_row = rows + tensor.to(tl.int64) * _COLUMNS
        seen_at = counters + _SEEN + tl.load(own_row + _KEY, mask=there, other=0)
        moves = tensor < moved
        if ACCUMULATED:
            seen = tl.load(seen_at, mask=there, other=0.0)
            has_grad = tl.load(own_row + _GRAD, mask=there, other=0) != 0
            seen = tl.where(has_grad, 1.0, seen)
            tl.store(active + tensor, seen, mask=there)
            moves = moves & (seen != 0)
            tl.store(seen_at, seen * kept_seen, mask=tensor < counted)
        tl.store(seen_at + tensors, zeros + step, mask=moves)
        tl.store(seen_at + 2 * tensors, zeros + next_product, mask=moves)
    if EACH:
        factor = tl.min(smallest, 0)

    tl.store(counters + _CALLS, tl.where(passed, calls + 1.0, calls))
    tl.store(counters + _PRODUCT, tl.where(passed & updating, next_product, product))
    skipped = tl.where(passed, skipped, skipped + 1.0)
    tl.store(counters + _SKIPPED, skipped)
    reported = (mode, tl.where(passed & updating, step, step - 1.0), rate, norm, factor, skipped)
    for i in tl.static_range(_REPORTED):
        tl.store(report + i, reported[i])
