"""Moments of 8 bits in memory, for Triton: how a block's codes and scales are loaded, widened, narrowed and stored.

The twin of core/compressed.py, which says what the codes are. A block is a tile of 32 rows, of whose columns each is a
group: its largest values are found by a reduction along the rows.
"""

import triton
import triton.language as tl

from nadam.core import compressed
from nadam.kernels.gpu.formats import bits_of, load, offsets, store

_WEYL, _LANES = tl.constexpr(compressed.WEYL), tl.constexpr(compressed.LANES)
_FIRST_MARGIN, _SECOND_MARGIN = tl.constexpr(compressed.FIRST_MARGIN), tl.constexpr(compressed.SECOND_MARGIN)
_FIRST_BITS, _SECOND_BINADES = tl.constexpr(compressed.FIRST_BITS), tl.constexpr(compressed.SECOND_BINADES)


@triton.jit
def noise(index, key):
    """32 bits for an element that look even over its neighbours, and like chance over the steps."""
    return index.to(tl.uint32) * _WEYL + key


@triton.jit
def widen_codes(first, second, first_scale, second_scale):
    """Both moments in float32, from codes and their groups' scales, all of them unsigned bytes."""
    unit = (first_scale.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    bits = (second_scale.to(tl.uint32) << 23) + (second.to(tl.uint32) << 19)
    return first.to(tl.int8, bitcast=True).to(tl.float32) * unit, bits.to(tl.float32, bitcast=True)


@triton.jit
def new_scales(largest, squares):
    """A group's scales, from the bits of its largest values."""
    top = (largest + _FIRST_MARGIN) >> 23
    unit = tl.where(top >= 255, tl.full(top.shape, 255, tl.uint32), tl.maximum(top, _FIRST_BITS + 1) - _FIRST_BITS)
    top = (squares + _SECOND_MARGIN) >> 23
    return unit, tl.maximum(top, _SECOND_BINADES) - _SECOND_BINADES


@triton.jit
def narrow_codes(first, second, unit, base, chance):
    """Codes, rounded by chance: its lower 14 bits and its upper 19. ``second`` is in bits, like scales and codes."""
    per_unit = ((254 - unit) << 23).to(tl.float32, bitcast=True)
    fraction = ((chance & 0x3FFF) | 0x44400000).to(tl.float32, bitcast=True)
    whole = first * per_unit + fraction
    # Of a group with an infinite scale all codes are 0, whatever bits a GPU gives a NaN.
    code = tl.where(whole != whole, chance ^ chance, bits_of(whole) >> 14)
    above = (second + (chance >> 13) - (base << 23)).to(tl.int32, bitcast=True) >> 19
    return code.to(tl.uint8), tl.maximum(above, 0).to(tl.uint8)


@triton.jit
def _scales(address, start, BLOCK: tl.constexpr):
    """Pointers to the scales of the block that begins at an element."""
    return address.to(tl.pointer_type(tl.uint8)) + start // BLOCK * _LANES + tl.arange(0, _LANES)


@triton.jit
def load_moments(
    first_at, second_at, first_scale_at, second_scale_at, start, left, BLOCK: tl.constexpr, WIDE: tl.constexpr
):  # fmt: skip
    """The moments of the first ``left`` elements of a block, in float32."""
    first = load(first_at, start, left, "octets", "octets", BLOCK, WIDE)
    second = load(second_at, start, left, "octets", "octets", BLOCK, WIDE)
    units, bases = tl.load(_scales(first_scale_at, start, BLOCK)), tl.load(_scales(second_scale_at, start, BLOCK))
    return widen_codes(first, second, units[None, :], bases[None, :])


@triton.jit
def store_moments(
    first_at, second_at, first_scale_at, second_scale_at, start, left, first, second, chance,
    BLOCK: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Narrow a block's moments and store those of its first ``left`` elements, and its scales."""
    magnitude = bits_of(first) & 0x7FFFFFFF
    # The NaN of NVIDIA's GPUs has all bits set: rounded up, it would be a zero.
    square = tl.where(second != second, tl.full(magnitude.shape, 0x7FC00000, tl.uint32), bits_of(second))
    largest, squares = magnitude, square
    if not WIDE:
        there = offsets(BLOCK) < left
        largest, squares = tl.where(there, largest, 0), tl.where(there, squares, 0)
    unit, base = new_scales(tl.max(largest, 0), tl.max(squares, 0))
    tl.store(_scales(first_scale_at, start, BLOCK), unit.to(tl.uint8))
    tl.store(_scales(second_scale_at, start, BLOCK), base.to(tl.uint8))
    first_code, second_code = narrow_codes(first, square, unit[None, :], base[None, :], chance)
    store(first_at, start, left, first_code, "octets", BLOCK, WIDE)
    store(second_at, start, left, second_code, "octets", BLOCK, WIDE)
