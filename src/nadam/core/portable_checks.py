"""Checks of the values in a portable state; each error says which, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import numpy as np

from nadam.core.compressed import FIRST_BITS, SCALES, SECOND_BINADES, num_scales

CODES = {"exp_avg": "int8", "exp_avg_sq": "uint8", **dict.fromkeys(SCALES.values(), "uint8")}
# The largest exponents with which all codes are finite.
LARGEST_SCALES = {"exp_avg_scale": 254 - FIRST_BITS, "exp_avg_sq_scale": 254 - SECOND_BINADES}


def check_codes(where: str, entry: Mapping[str, Any]) -> None:
    """That a parameter's moments, where there are scales, are codes that these fit."""
    there = [name for name in SCALES.values() if name in entry]
    if not there:
        return
    found = {name: _dtype(entry.get(name)) for name in CODES}
    if found != CODES:
        raise ValueError(f"{where}: {found}, expected {CODES}, or floating-point moments without scales")
    for name in there:
        scales, expected = entry[name], (num_scales(entry["exp_avg"].size),)
        if scales.shape != expected:
            raise ValueError(f"{where}.{name}: shape {scales.shape}, expected {expected}")
        if scales.size and scales.max() > LARGEST_SCALES[name]:
            raise ValueError(
                f"{where}.{name}: {scales.max()}, expected at most {LARGEST_SCALES[name]}: it is not finite"
            )


def check_array(where: str, slot: str, array: Any, like: Any, codes: bool = False) -> None:
    """That an array of a parameter's state, but for scales, is one like its first moment; codes are checked already."""
    is_code = codes and slot in SCALES
    if slot == "remainder":
        expected, right = "int16 or int8", _dtype(array) in ("int16", "int8")
    else:
        expected, right = "floating-point numbers", is_code or (_dtype(array) != "" and array.dtype.kind in "fc")
    if not right:
        found = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"{where}: {found}, expected an array of {expected}")
    if array.shape != like.shape:
        raise ValueError(f"{where}: shape {array.shape}, but that of exp_avg is {like.shape}")
    if slot == "remainder" or is_code:
        return
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: not all of its values are finite")
    if slot == "exp_avg_sq" and array.size and min(array.real.min(), array.imag.min()) < 0:
        raise ValueError(f"{where}: a negative value in an average of squares")


def _dtype(array: Any) -> str:
    """The dtype of an array of NumPy; of anything else nothing."""
    return str(array.dtype) if isinstance(array, np.ndarray) else ""


def check_count(given: Mapping[str, Any], name: str, where: str = "") -> None:
    """That a value of these is an integer of at least 0."""
    value = given.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{where}{name}={value!r}: expected an integer, {name} >= 0")


def check_number(name: str, value: Any, low: float, high: float, optional: bool = False) -> None:
    """That a value is a finite number between two others."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not (low <= value <= high and isfinite(value)):
        raise ValueError(f"{name}={value!r}: expected {low:g} <= {name} <= {high:g}")


def are_names(value: Any) -> bool:
    """Whether a value is a list of strings."""
    return isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value)


def check_names(what: str, given: Iterable[str], expected: Iterable[str]) -> None:
    """That these are the expected names, in whatever order."""
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        parts = [f"missing {some(missing)}" * bool(missing), f"not expected {some(unknown)}" * bool(unknown)]
        raise ValueError(f"{what}: {', '.join(filter(None, parts))}; see rename")


def some(names: list[str]) -> str:
    """Names for a message: the first of many."""
    return f"{names}" if len(names) <= 6 else f"{names[:5]} and {len(names) - 5} more"
