"""Checks of the values in a portable state; each error says which, what was expected and what was found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import isfinite
from typing import Any

import numpy as np


def check_array(where: str, slot: str, array: Any, like: Any) -> None:
    """That an array of a parameter's state is one, like its first moment."""
    kinds = "i" if slot == "remainder" else "fc"
    if not isinstance(array, np.ndarray) or array.dtype.kind not in kinds:
        found = getattr(array, "dtype", type(array).__name__)
        raise ValueError(
            f"{where}: {found}, expected an array of {'int16' if kinds == 'i' else 'floating-point numbers'}"
        )
    if array.shape != like.shape:
        raise ValueError(f"{where}: shape {array.shape}, but that of exp_avg is {like.shape}")
    if kinds != "i" and not np.isfinite(array).all():
        raise ValueError(f"{where}: not all of its values are finite")
    if slot == "exp_avg_sq" and array.size and min(array.real.min(), array.imag.min()) < 0:
        raise ValueError(f"{where}: a negative value in an average of squares")


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
