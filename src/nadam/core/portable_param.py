"""A parameter's state in the form that moves between hosts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from numpy.typing import NDArray

from nadam.core.compressed import SCALES
from nadam.core.portable_checks import check_array, check_codes, check_count, check_number
from nadam.core.portable_formats import wide_moments

Array = NDArray[Any]
# Arrays of a parameter's state, each but the scales of the parameter's shape.
SLOTS = ("exp_avg", "exp_avg_sq", "ema", "accumulator", "remainder", *SCALES.values())


@dataclass
class ParamState:
    """State of one parameter.

    Attributes:
        step: Updates of it.
        momentum_product: Product of the momenta of these updates; None where the optimizer keeps none, as Adam.
        exp_avg: First moment, not bias-corrected: float32 or float64, or complex, of the parameter's shape. Or int8
            codes (core/compressed.py), those of a parameter in C order.
        exp_avg_sq: Second moment, likewise; codes are uint8.
        ema: Moving average of the parameter, where there is one.
        accumulator: Sum of the gradients of this window, where they are accumulated.
        remainder: int16, what a bfloat16 parameter is short of a float32 one, where that is kept; or int8, of its upper
            24 bits.
        accumulated: Whether it had a gradient in this window.
        exp_avg_scale: Of codes, uint8: one for each of their groups.
        exp_avg_sq_scale: Likewise.
    """

    step: int
    momentum_product: float | None
    exp_avg: Array
    exp_avg_sq: Array
    ema: Array | None = None
    accumulator: Array | None = None
    remainder: Array | None = None
    accumulated: bool = False
    exp_avg_scale: Array | None = None
    exp_avg_sq_scale: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by name."""
        return {name: array for name in SLOTS if (array := getattr(self, name)) is not None}

    def having(self, arrays: Mapping[str, Array]) -> ParamState:
        """A copy with these arrays, by name, and no others."""
        given: dict[str, Any] = {**dict.fromkeys(SLOTS), **arrays}
        return replace(self, **given)

    def wide(self) -> ParamState:
        """A copy with float32 moments where they are codes."""
        return self.having(wide_moments(self.arrays()))


def checked_param(name: str, entry: Any) -> ParamState:
    """A parameter's state, from a dict of it.

    Raises:
        ValueError: Something is missing, of another kind, out of its range or not finite; it says what.
    """
    known = {each.name for each in fields(ParamState)}
    if not isinstance(entry, Mapping) or not {"step", "exp_avg", "exp_avg_sq"} <= set(entry) <= known:
        found = sorted(entry) if isinstance(entry, Mapping) else type(entry).__name__
        raise ValueError(f"{name}: {found}, expected step, exp_avg, exp_avg_sq and nothing but {sorted(known)}")
    check_count(entry, "step", f"{name}.")
    check_number(f"{name}.momentum_product", entry.get("momentum_product"), 0.0, 1.0, optional=True)
    if not isinstance(entry.get("accumulated", False), bool):
        raise ValueError(f"{name}.accumulated: {entry['accumulated']!r}, expected a bool")
    check_codes(name, entry)
    for slot in SLOTS:
        if slot in entry and slot not in SCALES.values():
            check_array(f"{name}.{slot}", slot, entry[slot], entry["exp_avg"], SCALES["exp_avg"] in entry)
    return ParamState(**{"momentum_product": None, **entry})
