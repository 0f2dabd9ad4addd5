"""Formats of a portable state: moments as 8-bit codes or wide, values of bfloat16 parameters with a remainder."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.compressed import SCALES, narrowed, widened
from nadam.core.portable_checks import some

Array = NDArray[Any]
Arrays = Mapping[str, Array]
Order = Sequence[int] | None  # axes in memory, outermost first; None for that of C


class Bfloat16(np.ndarray[Any, Any]):
    """The bits of bfloat16 numbers, as uint16: NumPy has such numbers only with ml_dtypes. BF16 in a checkpoint."""


def wide_moments(arrays: Arrays, order: Order = None) -> dict[str, Array]:
    """State of a parameter with float32 moments in the place of codes, which have their exact values.

    Example:
        >>> codes, exact = kept_moments({"exp_avg": np.ones(5000), "exp_avg_sq": np.ones(5000)}, True)
        >>> codes["exp_avg"].dtype, codes["exp_avg_sq_scale"].shape, exact
        (dtype('int8'), (192,), True)
        >>> wide = wide_moments(codes)
        >>> sorted(wide), wide["exp_avg"][:2]
        (['exp_avg', 'exp_avg_sq'], array([1., 1.], dtype=float32))
    """
    kept = {name: array for name, array in arrays.items() if name not in SCALES.values()}
    if len(kept) < len(arrays):
        flat = widened(*(_flat(kept[name], order) for name in SCALES), *(arrays[name] for name in SCALES.values()))
        kept |= {name: _shaped(each, kept[name].shape, order) for name, each in zip(SCALES, flat, strict=True)}
    return kept


def kept_moments(arrays: Arrays, codes: bool, order: Order = None) -> tuple[dict[str, Array], bool]:
    """State of a parameter with its moments as an optimizer keeps them, and whether these have the values of before.

    Args:
        arrays: By the names of `ParamState`; codes are those of C order.
        codes: Whether it keeps codes of 8 bits, of an order in memory; rounded to nearest.
        order: Of the axes there.
    """
    if not codes:
        return wide_moments(arrays), True
    if SCALES["exp_avg"] in arrays and order is None:
        return dict(arrays), True
    wide = wide_moments(arrays)
    flat = [_flat(wide[name], order).astype(np.float32) for name in SCALES]
    made = narrowed(*flat)
    exact = all((one == other).all() for one, other in zip(flat, widened(*made), strict=True))
    shaped = {name: _shaped(each, wide[name].shape, order) for name, each in zip(SCALES, made[:2], strict=True)}
    return wide | shaped | dict(zip(SCALES.values(), made[2:], strict=True)), exact


def warn_of_rounding(names: list[str]) -> None:
    """Warn that moments were rounded to 8 bits, and how far."""
    if names:
        warnings.warn(
            f"state_bits=8: the moments of {some(names)} are rounded: first ones by up to 1/128 of the largest of "
            "their 32, second ones by up to 1/32 of themselves, below 2**-15 of that largest by more",
            stacklevel=2,
        )


def split_values(values: Mapping[str, Array], remainders: Arrays) -> dict[str, Array]:
    """Values to be saved: of float32 ones that are a bfloat16 number and a remainder, without that, which is saved."""
    return {name: _without(array, remainders[name]) if name in remainders else array for name, array in values.items()}


def joined_values(values: Mapping[str, Array], remainders: Arrays) -> dict[str, Array]:
    """What `split_values` split, as it was.

    Example:
        >>> rest = {"w": np.array([-3, 7], np.int8)}
        >>> values = {"w": np.array([0x3F7FFD00, 0x40000700], np.uint32).view(np.float32)}
        >>> split = split_values(values, rest)
        >>> [hex(bits) for bits in split["w"]], bool((joined_values(split, rest)["w"] == values["w"]).all())
        (['0x3f80', '0x4000'], True)
    """
    made = dict(values)
    for name, rest in remainders.items():
        if name in values and values[name].dtype == np.uint16 and values[name].shape == rest.shape:
            upper = np.asarray(values[name]).astype(np.uint32) << np.uint32(16)
            made[name] = np.asarray(upper + _lower(rest)).view(np.float32)
    return made


def _without(array: Array, rest: Array) -> Array:
    if array.dtype != np.float32 or array.shape != rest.shape:
        return array
    upper = np.asarray(np.asarray(array, order="C").view(np.uint32) - _lower(rest))
    if (upper & np.uint32(0xFFFF)).any():  # of values that were set without their remainder
        return array
    return np.asarray(upper >> np.uint32(16), np.uint16).view(Bfloat16)


def _lower(rest: Array) -> Array:
    """Remainders as what is added to the bits of a float32, modulo 2**32: signed, since bfloat16 is the nearest."""
    return rest.astype(np.int32).view(np.uint32) << np.uint32(16 - 8 * rest.itemsize)


def is_cut(rest: Array | None, bits: int) -> bool:
    """Whether remainders have others than 0 among the bits of theirs that are not kept."""
    return rest is not None and bool((_lower(rest) & np.uint32((1 << 16 - bits) - 1)).any())


def _flat(array: Array, order: Order) -> Array:
    """Elements in an order of memory."""
    return (array if order is None else array.transpose(order)).reshape(-1)


def _shaped(flat: Array, shape: tuple[int, ...], order: Order) -> Array:
    """Elements in an order of memory, as an array of a shape that lies so."""
    if order is None:
        return flat.reshape(shape)
    return flat.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
