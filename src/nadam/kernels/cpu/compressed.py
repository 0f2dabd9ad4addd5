"""Moments of 8 bits in memory, for Numba: how codes are widened and narrowed, and a pass over blocks of them.

The twin of core/compressed.py, which says what the codes are.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import njit, types, uint8, uint32
from numba.core import cgutils
from numba.extending import intrinsic

from nadam.core.compressed import BLOCK, FIRST_BITS, FIRST_MARGIN, LANES, SECOND_BINADES, SECOND_MARGIN, WEYL
from nadam.kernels import layout as at
from nadam.kernels.cpu.formats import KEEP_NAN, added, bits_of_float, choose, float_from_bits, multiplied
from nadam.kernels.cpu.hints import AHEAD, apart, prefetch, prefetch_to_write, wide_vectors


def _scratch(storage: Any, size: int) -> Any:
    @intrinsic
    def scratch(typing: Any) -> Any:
        def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            place = cgutils.alloca_once(builder, context.get_data_type(storage), size=size)
            place.align = 64
            return place

        return types.CPointer(storage)(), build

    return scratch


_of_block, _of_group = _scratch(types.float32, BLOCK), _scratch(types.uint32, LANES)


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of two uint32."""
    return types.uint32(types.uint32, types.uint32), lambda context, builder, sig, args: builder.select(
        builder.icmp_unsigned(">", *args), *args
    )


@intrinsic
def shifted_code(typing: Any, bits: Any) -> Any:
    """The upper 13 bits of an int32, at least 0."""

    def build(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        zero, shifted = ir.Constant(ir.IntType(32), 0), builder.ashr(args[0], ir.Constant(ir.IntType(32), 19))
        return builder.select(builder.icmp_signed(">", shifted, zero), shifted, zero)

    return types.uint32(types.uint32), build


@intrinsic
def signed_float(typing: Any, byte: Any) -> Any:
    """A byte, as a signed number, in float32."""
    return types.float32(types.uint8), lambda context, builder, sig, args: builder.sitofp(args[0], ir.FloatType())


@njit(inline="always")
def noise(index, key):
    """32 bits for an element that look even over its neighbours, and like chance over the steps."""
    return added(multiplied(uint32(index), uint32(WEYL)), uint32(key))


@njit(inline="always")
def magnitude_bits(value):
    """The bits of a float32 without its sign."""
    return uint32(bits_of_float(value) & uint32(0x7FFFFFFF))


@njit(inline="always")
def scales_of(m_scale, v_scale):
    """A group's scales as bits of float32: the unit of its first moments, the smallest of its second moments."""
    return uint32(uint32(m_scale) << uint32(23)), uint32(uint32(v_scale) << uint32(23))


@njit(inline="always")
def widen_codes(m, v, unit, base):
    """The codes of an element, in float32."""
    return signed_float(m) * float_from_bits(unit), float_from_bits(uint32(base + uint32(uint32(v) << uint32(19))))


@njit(inline="always")
def new_scales(largest, squares):
    """A group's scales, from the bits of its largest values; then the same as `narrow_codes` takes them."""
    top = uint32(uint32(largest + uint32(FIRST_MARGIN)) >> uint32(23))
    unit = uint32(larger(top, uint32(FIRST_BITS + 1)) - uint32(FIRST_BITS))
    unit = choose(top >= uint32(255), uint32(255), unit)
    top = uint32(uint32(squares + uint32(SECOND_MARGIN)) >> uint32(23))
    base = uint32(larger(top, uint32(SECOND_BINADES)) - uint32(SECOND_BINADES))
    return uint8(unit), uint8(base), uint32(uint32(uint32(254) - unit) << uint32(23)), uint32(base << uint32(23))


@njit(inline="always")
def narrow_codes(first, second, per_unit, base, noise):
    """The codes of an element, rounded by its noise: the lower 14 bits and the upper 19."""
    fraction = float_from_bits(uint32(uint32(noise & uint32(0x3FFF)) | uint32(0x44400000)))
    whole = bits_of_float(first * float_from_bits(per_unit) + fraction)
    above = uint32(uint32(bits_of_float(second) + uint32(noise >> uint32(13))) - base)
    return uint8(uint32(whole >> uint32(14))), uint8(shifted_code(above))


def of_blocks(advance: Callable[..., Any], p_width: int, g_width: int) -> tuple[Any, Any]:
    """The pass over a block, and over part of one.

    First with float32 moments, of which each group's largest are found; then these become codes.

    Args:
        advance: Does an element, given its moments, and gives the new ones.
        p_width: Bytes of a parameter.
        g_width: Bytes of a gradient.
    """

    def over(whole: bool) -> Any:
        @njit(error_model="numpy", fastmath=KEEP_NAN, _nrt=False)
        def block(p, r, g, m, v, m_scales, v_scales, e, a, n, s, factor, decay, key, descriptor, start):
            apart()
            wide_vectors()
            soon = start + AHEAD
            p_next, g_next = descriptor[at.PARAM] + soon * p_width, descriptor[at.GRAD] + soon * g_width
            m_next, v_next = descriptor[at.EXP_AVG] + soon, descriptor[at.EXP_AVG_SQ] + soon
            units, bases, largest, squares = _of_group(), _of_group(), _of_group(), _of_group()
            firsts, seconds = _of_block(), _of_block()
            for k in range(LANES):
                units[k], bases[k] = scales_of(m_scales[k], v_scales[k])
                largest[k] = squares[k] = uint32(0)
            for row in range(0, BLOCK if whole else n, LANES):
                row_key = noise(row, key)
                prefetch_to_write(p_next + row * p_width, LANES * p_width)
                prefetch(g_next + row * g_width, LANES * g_width)
                prefetch_to_write(m_next + row, LANES)
                prefetch_to_write(v_next + row, LANES)
                for k in range(LANES if whole else min(LANES, n - row)):
                    i = row + k
                    old, mean = widen_codes(m[i], v[i], units[k], bases[k])
                    first, second = advance(i, old, mean, p, r, g, e, a, s, factor, decay, noise(k, row_key))
                    firsts[i], seconds[i] = first, second
                    largest[k] = larger(largest[k], magnitude_bits(first))
                    squares[k] = larger(squares[k], bits_of_float(second))
            for k in range(LANES):
                m_scales[k], v_scales[k], units[k], bases[k] = new_scales(largest[k], squares[k])
            for row in range(0, BLOCK if whole else n, LANES):
                row_key = noise(row, key)
                for k in range(LANES if whole else min(LANES, n - row)):
                    i = row + k
                    m[i], v[i] = narrow_codes(firsts[i], seconds[i], units[k], bases[k], noise(k, row_key))

        return block

    return over(True), over(False)
