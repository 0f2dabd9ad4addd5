"""Number formats in a GPU's memory, and the functions that the rule is compiled with.

They give the bits of kernels/cpu/formats.py, so that state which one of them wrote goes on at the other.
"""

import math

import triton
import triton.language as tl

from nadam.core import compressed, gradient, scalars
from nadam.core.dtypes import COMPUTE_DTYPE, SPLIT, SPLIT8
from nadam.core.rebind import bind_element, bind_scalars
from nadam.core.scalars import Scalars
from nadam.kernels.gpu.source import compiled, jitted

_SPLIT, _SPLIT8 = tl.constexpr(SPLIT), tl.constexpr(SPLIT8)
_ROWS, _LANES, _TILE = (tl.constexpr(n) for n in (compressed.ROWS, compressed.LANES, compressed.BLOCK))


@triton.jit
def root(value):
    """The square root, rounded correctly: Triton's own is approximate where it is of float32."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:  # noqa: RET505  # a branch of the compiler's
        return tl.sqrt_rn(value)


@triton.jit
def minimum(value, bound):
    """The smaller one; a NaN value stays."""
    return tl.where(value > bound, bound, value)


@triton.jit
def maximum(value, bound):
    """The larger one; a NaN value stays."""
    return tl.where(value < bound, bound, value)


@triton.jit
def power(base, exponent):
    """A constant to a float64 power."""
    return tl.exp(exponent * tl.log(tl.full((), base, tl.float64)))


@triton.jit
def expm1(value):
    """exp(value) - 1 of a float64 <= 0 with all of its digits.

    The error of rounding exp(value) is the same in numerator and denominator (Kahan).
    """
    power_of_e = tl.exp(value)
    less_one = power_of_e - 1.0
    exact = less_one * value / tl.log(power_of_e)
    return tl.where(less_one == 0.0, value, tl.where(less_one == -1.0, less_one, exact))


@triton.jit
def _log(value):
    return tl.log(value)


@triton.jit
def _where(condition, yes, no):
    return tl.where(condition, yes, no)


_made = bind_scalars(
    compiled,
    warmup=tl.constexpr(scalars.MOMENTUM_WARMUP),
    where=_where,
    maximum=maximum,
    sqrt=root,
    expm1=expm1,
    log=_log,
    power=power,
)
clamp_eps, step_scalars = _made["clamp_eps"], _made["scalars"]
clip_factor = compiled(gradient.clip_factor, minimum=minimum, maximum=maximum, TINY=tl.constexpr(gradient.TINY))
global_clip_factor = compiled(gradient.global_clip_factor, clip_factor=clip_factor)


@triton.constexpr_function
def memory_type(FORMAT):
    """How an element of a format is loaded; a bfloat16 as 16 bits, like what is "bits" to begin with."""
    known = {"float16": tl.float16, "float32": tl.float32, "float64": tl.float64, "octets": tl.uint8}
    return known.get(FORMAT, tl.uint16)


@triton.jit
def offsets(BLOCK: tl.constexpr):
    """The elements of a block, in a row; those of a block of core/compressed.py in its rows."""
    if BLOCK == _TILE:
        return tl.arange(0, _ROWS)[:, None] * _LANES + tl.arange(0, _LANES)[None, :]
    else:  # noqa: RET505  # a branch of the compiler's
        return tl.arange(0, BLOCK)


@triton.jit
def place(address, start, FORMAT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to BLOCK elements of a tensor; with WIDE the compiler knows that they begin at 16 bytes."""
    pointer = address.to(tl.pointer_type(memory_type(FORMAT))) + start
    if WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offsets(BLOCK)


@triton.jit
def load(
    address, start, left, FORMAT: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr,
    MAY_BE_ABSENT: tl.constexpr = False,
):  # fmt: skip
    """The first ``left`` of BLOCK elements, widened, else zeros; zeros of an absent tensor, at address 0.

    For 16 bytes at once the compiler must also see that ``left`` is a multiple of so many elements.
    """
    there = offsets(BLOCK) < left
    if MAY_BE_ABSENT:  # a condition made into a block is no mask to the interpreter
        there = (tl.full(there.shape, address, tl.int64) != 0) & there
    values = tl.load(place(address, start, FORMAT, BLOCK, WIDE), mask=there, other=0)
    if FORMAT == "bfloat16":
        values = widen_bfloat16(values)
    if FORMAT != "bits" and FORMAT != "octets":
        values = values.to(memory_type(COMPUTE))
    return values


@triton.jit
def store(address, start, left, values, FORMAT: tl.constexpr, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    """Narrow values to a format, to nearest, and store the first ``left`` of them."""
    there = offsets(BLOCK) < left
    tl.store(place(address, start, FORMAT, BLOCK, WIDE), narrow(values, FORMAT), mask=there)


@triton.jit
def bits_of(value):
    """The 32 bits of a float32."""
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def widen_bfloat16(half):
    """bfloat16 bits -> float32, exact."""
    return (half.to(tl.uint32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def narrow_bfloat16(value):
    """float32 -> bfloat16 bits, to nearest even; a NaN is made quiet."""
    bits = bits_of(value)
    rounded = bits + ((bits >> 16) & 1) + 0x7FFF
    return (tl.where(value != value, bits | 0x00400000, rounded) >> 16).to(tl.uint16)


@triton.jit
def narrow_bfloat16_split(value):
    """float32 -> bfloat16 bits, to nearest, halves away from zero."""
    rounded = bits_of(value) + 0x8000
    quiet = tl.full(rounded.shape, 0x7FC00000, tl.uint32)
    return (tl.where(value != value, quiet, rounded) >> 16).to(tl.uint16)


@triton.jit
def rest_of_bfloat16(value):
    """The 16 bits by which `join_bfloat16` gets the float32 back from its bfloat16."""
    bits = bits_of(value)
    return (tl.where(value != value, bits ^ bits, bits) & 0xFFFF).to(tl.uint16)


@triton.jit
def join_bfloat16(half, rest):
    """The float32 that was split."""
    lower = rest.to(tl.uint32)
    upper = (half.to(tl.uint32) << 16) - ((lower >> 15) << 16)
    return (upper | lower).to(tl.float32, bitcast=True)


@triton.jit
def round_to_24_bits(value, chance):
    """The upper 24 bits of a float32, up or down, the likelier the nearer, by the upper 8 of chance."""
    rounded = bits_of(value) + (chance >> 24)
    quiet = tl.full(rounded.shape, 0x7FC00000, tl.uint32)
    return ((tl.where(value != value, quiet, rounded) >> 8) << 8).to(tl.float32, bitcast=True)


@triton.jit
def hash32(index, key):
    """32 bits that look like chance, of an element and a key: those of `core.rounding.hash32`."""
    x = (index.to(tl.uint32) * 0x9E3779B9) ^ key
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def narrow_bfloat16_stochastic(value, chance):
    """float32 -> bfloat16 bits: up or down, the likelier the nearer."""
    bits = bits_of(value)
    finite = (bits & 0x7F800000) != 0x7F800000
    special = tl.where(value != value, bits | 0x00400000, bits)
    return (tl.where(finite, bits + (chance >> 16), special) >> 16).to(tl.uint16)


@triton.jit
def narrow(values, FORMAT: tl.constexpr):
    """What to store in a format, to nearest."""
    if FORMAT == "bfloat16":
        values = narrow_bfloat16(values)
    elif FORMAT == _SPLIT or FORMAT == _SPLIT8:  # noqa: SIM109  # Triton knows no `in`
        values = narrow_bfloat16_split(values)
    elif FORMAT == "float16":
        values = values.to(tl.float16)
    return values


INFINITY = tl.constexpr(math.inf)


@triton.jit
def _as_it_is(param):
    return param


@triton.jit
def _read_back_bfloat16(param):
    return widen_bfloat16(narrow_bfloat16(param))


@triton.jit
def _read_back_float16(param):
    return param.to(tl.float16).to(tl.float32)


_element = bind_element(compiled, sqrt=root, minimum=minimum, maximum=maximum, where=_where)["element"]
# What an element goes through, by the parameter's format: what is read back of it differs.
ELEMENT = {
    **dict.fromkeys(COMPUTE_DTYPE, _element(_as_it_is)),
    "bfloat16": _element(_read_back_bfloat16),
    "float16": _element(_read_back_float16),
}
# The scalars that lie at an address.
_loads = ", ".join(f"tl.load(address + {i})" for i in range(len(Scalars._fields)))
scalars_at = jitted(f"def scalars_at(address):\n    return Scalars({_loads})", "scalars_at", {"Scalars": Scalars})
