"""Moments of 8 bits: the format, in array operations. Each compiler has a twin of these, which a test compares.

Elements share their scales in groups of 32. A block is 2,048 elements in the order of memory, 32 rows of 64, and a
group is a column of it: a vector of elements then has a vector of scales, and the largest of a group is found without
crossing lanes.

A scale is a byte, the exponent of a power of two, as of OCP's Microscaling formats. First moments are integers, as of
MXINT8; second moments are unsigned floats of 4 bits of exponent and 4 of mantissa, without a zero: their smallest is
2**-16 to 2**-14.9 of the largest of the group. So a second moment is never rounded to 0 while any of its group is
2**-110 or more, and the step that divides by its square root cannot explode.

Both are rounded stochastically, without bias: a second moment that moves by a thousandth of itself at a step would
otherwise never leave a code whose neighbours are a sixteenth away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Array = Any  # of NumPy or JAX

# Moments, and the names of their scales where they are codes.
SCALES = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
ROWS, LANES = 32, 64
BLOCK = ROWS * LANES
SMALLEST = 4096  # elements; smaller tensors keep float32 moments, whose bytes nobody misses
WEYL = 0x9E3779B9  # multiples of it, modulo 2**32, are spread evenly
# Added to the bits of the largest magnitude of a group, so that rounding up stays within its codes.
FIRST_MARGIN, SECOND_MARGIN = 0x1FFFF, 0x7FFFF
# The exponent that a scale is less than that of the largest.
FIRST_BITS, SECOND_BINADES = 6, 15


class Bits(NamedTuple):
    """Array operations: those of NumPy or JAX, and how 32 bits are taken for a float32 and back."""

    xp: Any
    of_float: Callable[[Array], Array]
    to_float: Callable[[Array], Array]


NUMPY = Bits(np, lambda array: array.view(np.uint32), lambda array: array.view(np.float32))


def num_scales(size: int) -> int:
    """Scales of a tensor of so many elements, for each moment.

    Example:
        >>> num_scales(2048), num_scales(2049)
        (64, 128)
    """
    return -(-size // BLOCK) * LANES


def is_compressed(size: int, compute_dtype: str) -> bool:
    """Whether the moments of a parameter of so many elements are kept in 8 bits where that is asked for.

    Example:
        >>> is_compressed(4095, "float32"), is_compressed(4096, "float32"), is_compressed(4096, "float64")
        (False, True, False)
    """
    return size >= SMALLEST and compute_dtype == "float32"


def noise(index: Array, key: Any) -> Array:
    """32 bits for an element, from its index and a key of this tensor and step: evenly spread over the elements."""
    return index * np.uint32(WEYL) + key


def widen(first: Array, second: Array, first_scale: Array, second_scale: Array, bits: Bits = NUMPY) -> Any:
    """Both moments in float32, from codes of shape (blocks, 32, 64) and scales of shape (blocks, 64)."""
    xp, shift = bits.xp, np.uint32(23)
    units = bits.to_float(first_scale.astype(xp.uint32) << shift)[:, None]
    bases = (second_scale.astype(xp.uint32) << shift)[:, None]
    wide = bits.to_float(bases + (second.astype(xp.uint32) << np.uint32(19)))
    return first.astype(xp.float32) * units, wide


def narrow(first: Array, second: Array, chance: Array, bits: Bits = NUMPY) -> Any:
    """Codes of both moments and their scales, from float32 of shape (blocks, 32, 64) and as many 32 bits of chance."""
    xp = bits.xp
    magnitudes = bits.of_float(first) & np.uint32(0x7FFFFFFF)
    second = bits.of_float(second)
    first_scale = _exponent(xp, magnitudes, FIRST_MARGIN, FIRST_BITS, 1)
    second_scale = _exponent(xp, second, SECOND_MARGIN, SECOND_BINADES, 0)
    # In multiples of the unit and shifted to between 512 and 1,024, where all exponents are the same, the whole part
    # is eight bits above the fourteen of the fraction.
    per_unit = bits.to_float((np.uint32(254) - first_scale) << np.uint32(23))[:, None]
    fraction = bits.to_float((chance & np.uint32(0x3FFF)) | np.uint32(0x44400000))
    whole = bits.of_float(first * per_unit + fraction) >> np.uint32(14)
    above = second + (chance >> np.uint32(13)) - (second_scale << np.uint32(23))[:, None]
    # A compiler that computes moments once for the scales and again for the codes may give them another last bit: 256
    # would then be code 0, the smallest of the group.
    codes = xp.clip(above.astype(xp.int32) >> np.int32(19), np.int32(0), np.int32(255)).astype(xp.uint8)
    return whole.astype(xp.uint8).astype(xp.int8), codes, first_scale.astype(xp.uint8), second_scale.astype(xp.uint8)


def _exponent(xp: Any, magnitudes: Array, margin: int, less: int, least: int) -> Array:
    """The scale of each group; of first moments that are not all finite, 255."""
    exponent = (magnitudes.max(axis=1) + np.uint32(margin)) >> np.uint32(23)
    scale = xp.maximum(exponent, np.uint32(less + least)) - np.uint32(less)
    return xp.where(exponent >= 255, np.uint32(255), scale) if least else scale


def in_blocks(array: Array, bits: Bits = NUMPY) -> Array:
    """Elements in C order as blocks, the last one filled with zeros."""
    return bits.xp.pad(array.reshape(-1), (0, -array.size % BLOCK)).reshape(-1, ROWS, LANES)


def _like(array: Array, blocks: Array) -> Array:
    return blocks.reshape(-1)[: array.size].reshape(array.shape)


def check_state_options(state_bits: int | None, seed: int) -> None:
    """That how state is kept is something that can be.

    Raises:
        ValueError: It is not; it says what can.
    """
    if state_bits not in (None, 8) or isinstance(state_bits, bool):
        raise ValueError(f"state_bits={state_bits!r}: expected 8 or None")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 32:
        raise ValueError(f"seed={seed!r}: expected an integer, 0 <= seed < 2**32")


def widened(
    first: Array, second: Array, first_scale: Array, second_scale: Array, *, bits: Bits = NUMPY
) -> tuple[Array, Array]:
    """Moments in float32, from codes and scales in C order.

    Example:
        >>> first, second = np.linspace(-1, 1, 5000, dtype=np.float32), np.ones(5000, np.float32)
        >>> back = widened(*narrowed(first, second))
        >>> bool(abs(back[0] - first).max() <= 2**-7), bool((back[1] == 1).all())
        (True, True)
    """
    scales = first_scale.reshape(-1, LANES), second_scale.reshape(-1, LANES)
    wide = widen(in_blocks(first, bits), in_blocks(second, bits), *scales, bits)
    return _like(first, wide[0]), _like(first, wide[1])


def narrowed(first: Array, second: Array, *, key: Any = None, bits: Bits = NUMPY) -> tuple[Array, Array, Array, Array]:
    """Codes of moments in C order, rounded by a key or to nearest, and their scales."""
    blocks = in_blocks(first, bits), in_blocks(second, bits)
    chance: Array = np.uint32(1 << 31 | 1 << 13)  # half of what is rounded away: 19 bits above and 14 below
    if key is not None:
        chance = noise(bits.xp.arange(blocks[0].size, dtype=np.uint32), key).reshape(blocks[0].shape)
    *codes, a, b = narrow(*blocks, chance, bits)
    return _like(first, codes[0]), _like(first, codes[1]), a.reshape(-1), b.reshape(-1)
