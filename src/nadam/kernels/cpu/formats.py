"""Number formats in memory, for Numba: how each is widened on load and rounded on store.

The rule computes in float32, or in float64 for float64 parameters; half precision is 16 bits in memory and nothing
else. The conversions are integer arithmetic, so they need no instruction that an older processor lacks.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir
from numba import float32, float64, njit, types, uint8, uint16, uint32
from numba.extending import intrinsic

from nadam.core.dtypes import SPLIT, SPLIT8

_SMALLEST_NORMAL_HALF = 2.0**-14
# What the compiler may do to arithmetic: fuse a product and a sum, share a reciprocal; nothing that assumes away NaN or
# infinity.
KEEP_NAN = {"contract", "nsz", "arcp"}


@intrinsic
def float_from_bits(typing: Any, bits: Any) -> Any:
    """The float32 that has these 32 bits."""
    return types.float32(types.uint32), lambda context, b, sig, args: b.bitcast(args[0], ir.FloatType())


@intrinsic
def bits_of_float(typing: Any, value: Any) -> Any:
    """The 32 bits of a float32."""
    return types.uint32(types.float32), lambda context, b, sig, args: b.bitcast(args[0], ir.IntType(32))


@intrinsic
def choose(typing: Any, condition: Any, this: Any, that: Any) -> Any:
    """``this if condition else that`` on 32 bits, without a branch: a branch would keep the loop from vectorizing."""
    bits = types.uint32
    return bits(types.boolean, bits, bits), lambda context, b, sig, args: b.select(
        context.cast(b, args[0], types.boolean, types.boolean), args[1], args[2]
    )


@intrinsic
def sign_extended(typing: Any, bits: Any) -> Any:
    """8 or 16 bits as a signed number of 32."""
    return types.uint32(bits), lambda context, b, sig, args: b.sext(args[0], ir.IntType(32))


# Numba makes the sum and the product of two uint32 a uint64, hence a uint32() around each step below. Of what is used
# twice LLVM then makes vectors of uint64, which take twice as long and more: these stay 32 bits wide.


@intrinsic
def added(typing: Any, a: Any, b: Any) -> Any:
    """The lower 32 bits of a sum."""
    return types.uint32(types.uint32, types.uint32), lambda context, b, sig, args: b.add(*args)


@intrinsic
def multiplied(typing: Any, a: Any, b: Any) -> Any:
    """The lower 32 bits of a product."""
    return types.uint32(types.uint32, types.uint32), lambda context, b, sig, args: b.mul(*args)


@njit(inline="always")
def to_nearest_even(bits, dropped):
    """An integer whose upper bits are right once the ``dropped`` lower ones go."""
    last = uint32(uint32(bits >> uint32(dropped)) & uint32(1))
    return uint32(uint32(bits + last) + uint32((1 << (dropped - 1)) - 1))


@njit(inline="always")
def widen_bfloat16(bits):
    """bfloat16 bits -> float32, exact: they are its upper half."""
    return float_from_bits(uint32(uint32(bits) << uint32(16)))


@njit(inline="always")
def narrow_bfloat16(value):
    """float32 -> bfloat16 bits, to nearest even; a NaN is not rounded (it would carry over) but made quiet."""
    bits = bits_of_float(value)
    quiet = uint32(bits | uint32(0x00400000))
    return uint16(uint32(choose(value != value, quiet, to_nearest_even(bits, 16)) >> uint32(16)))


@njit(inline="always")
def narrow_bfloat16_plain(value):
    """float32 -> bfloat16 bits in three operations less, where a NaN ends in 16 zeros: then it does not carry over."""
    return uint16(uint32(to_nearest_even(bits_of_float(value), 16) >> uint32(16)))


@njit(inline="always")
def hash32(index, key):
    """32 bits for an element of a tensor that look like chance, from its index and a key of this tensor and step.

    A finalizer of the kind of murmur3's, with the constants that Wellons found (lowbias32).
    """
    x = uint32(multiplied(uint32(index), uint32(0x9E3779B9)) ^ uint32(key))
    x = multiplied(uint32(x ^ uint32(x >> uint32(16))), uint32(0x7FEB352D))
    x = multiplied(uint32(x ^ uint32(x >> uint32(15))), uint32(0x846CA68B))
    return uint32(x ^ uint32(x >> uint32(16)))


@njit(inline="always")
def narrow_bfloat16_stochastic(value, bits32):
    """float32 -> bfloat16 bits: up or down, the likelier the nearer, so that the mean of many is the number itself."""
    bits = bits_of_float(value)
    rounded = uint32(bits + uint32(bits32 >> uint32(16)))
    quiet = uint32(bits | uint32(0x00400000))
    finite = uint32(bits & uint32(0x7F800000)) != uint32(0x7F800000)
    return uint16(uint32(choose(finite, rounded, choose(value != value, quiet, bits)) >> uint32(16)))


@njit(inline="always")
def split_bfloat16(value, noise):
    """float32 -> bfloat16 to nearest, halves away from zero, and what it lacks, which then fits into 16 signed bits."""
    bits = choose(value != value, uint32(0x7FC00000), bits_of_float(value))
    return uint16(added(bits, uint32(0x8000)) >> uint32(16)), uint16(uint32(bits & uint32(0xFFFF)))


@njit(inline="always")
def split_8_bits(value, noise):
    """`split_bfloat16` with 8 bits, after the value was rounded to 24, without bias, by the upper 8 of the noise."""
    rounded = added(bits_of_float(value), uint32(uint32(noise) >> uint32(24)))
    bits = choose(value != value, uint32(0x7FC00000), rounded)
    return uint16(added(bits, uint32(0x8000)) >> uint32(16)), uint8(uint32(uint32(bits >> uint32(8)) & uint32(0xFF)))


@njit(inline="always")
def split_8_bits_plain(value, noise):
    """`split_8_bits` in two operations less, where a NaN's lowest 13 bits are zeros: then it does not carry over."""
    bits = added(bits_of_float(value), uint32(uint32(noise) >> uint32(24)))
    return uint16(added(bits, uint32(0x8000)) >> uint32(16)), uint8(uint32(uint32(bits >> uint32(8)) & uint32(0xFF)))


@njit(inline="always")
def join_bfloat16(half, rest):
    """The float32 that was split: the rest is a signed number."""
    return float_from_bits(added(uint32(uint32(half) << uint32(16)), sign_extended(uint16(rest))))


@njit(inline="always")
def join_8_bits(half, rest):
    """`join_bfloat16` of a rest of 8 bits."""
    shifted = uint32(sign_extended(uint8(rest)) << uint32(8))
    return float_from_bits(added(uint32(uint32(half) << uint32(16)), shifted))


@njit(inline="always")
def widen_float16(bits):
    """IEEE half bits -> float32, exact; also where the processor takes subnormal numbers for zero, as within XLA."""
    magnitude = uint32(uint32(uint32(bits) & uint32(0x7FFF)) << uint32(13))
    normal = uint32(magnitude + uint32(0x38000000))
    subnormal = bits_of_float(float_from_bits(uint32(magnitude + uint32(0x38800000))) - float32(_SMALLEST_NORMAL_HALF))
    finite = choose(magnitude < uint32(0x00800000), subnormal, normal)
    special = uint32(magnitude | uint32(0x7F800000))
    sign = uint32(uint32(uint32(bits) & uint32(0x8000)) << uint32(16))
    return float_from_bits(uint32(choose(magnitude >= uint32(0x0F800000), special, finite) | sign))


@njit(inline="always")
def narrow_float16(value):
    """float32 -> IEEE half bits, to nearest even; subnormal halves by adding 0.5, whose last bit is theirs."""
    bits = bits_of_float(value)
    magnitude = uint32(bits & uint32(0x7FFFFFFF))
    normal = uint32(to_nearest_even(uint32(magnitude - uint32(0x38000000)), 13) >> uint32(13))
    subnormal = uint32(bits_of_float(float_from_bits(magnitude) + float32(0.5)) - uint32(0x3F000000))
    finite = choose(magnitude < uint32(0x38800000), subnormal, normal)
    special = choose(magnitude > uint32(0x7F800000), uint32(0x7E00), uint32(0x7C00))
    half = choose(magnitude >= uint32(0x477FF000), special, finite)
    return uint16(uint32(half | uint32(uint32(bits & uint32(0x80000000)) >> uint32(16))))


@njit(inline="always")
def to_float32(value):
    """Any number -> float32."""
    return float32(value)


@njit(inline="always")
def to_float64(value):
    """Any number -> float64."""
    return float64(value)


class Format(NamedTuple):
    """How a number format lies in memory and becomes the compute dtype."""

    storage: Any  # Numba type of one element in memory
    width: int  # bytes
    widen: Callable[..., Any]
    narrow: Callable[..., Any]


FORMATS = {
    "float16": Format(types.uint16, 2, widen_float16, narrow_float16),
    "bfloat16": Format(types.uint16, 2, widen_bfloat16, narrow_bfloat16),
    SPLIT: Format(types.uint16, 2, widen_bfloat16, narrow_bfloat16),
    SPLIT8: Format(types.uint16, 2, widen_bfloat16, narrow_bfloat16),
    "float32": Format(types.float32, 4, to_float32, to_float32),
    "float64": Format(types.float64, 8, to_float64, to_float64),
}
CASTS = {"float32": to_float32, "float64": to_float64}


class Remainder(NamedTuple):
    """How what a bfloat16 parameter lacks lies in memory, and how the two are joined."""

    storage: Any  # Numba type of one element in memory
    width: int  # bytes
    join: Callable[..., Any]  # (parameter, remainder) -> value
    split: Callable[..., Any]  # (value, 32 bits of noise) -> (parameter, remainder)


REMAINDERS = {
    SPLIT: Remainder(types.uint16, 2, join_bfloat16, split_bfloat16),
    SPLIT8: Remainder(types.uint8, 1, join_8_bits, split_8_bits),
}
