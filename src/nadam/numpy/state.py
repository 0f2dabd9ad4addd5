"""State of the optimizer for NumPy arrays: what is in it, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.compressed import SCALES
from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SEEN, SKIPPED
from nadam.core.portable_checks import CODES, check_array, check_codes
from nadam.core.portable_formats import kept_moments, warn_of_rounding

if TYPE_CHECKING:
    from nadam.numpy.parameters import Parameters
    from nadam.numpy.plans import Parameter

Array = NDArray[Any]
OPTIMIZER = "nadam"
FORMAT = 1


def state_dict(parameters: Parameters, learning_rate: float | None) -> dict[str, Any]:
    """The state of an optimizer for NumPy arrays, copied."""
    counters = parameters.counters
    return {
        "optimizer": OPTIMIZER,
        "format": FORMAT,
        "iteration": counters.calls,
        "momentum_product": counters.momentum_product,
        "skipped_steps": counters.skipped,
        "learning_rate": learning_rate,
        "accumulated": [entry.name for entry, seen in zip(parameters.entries, counters.seen, strict=True) if seen],
        "state": {entry.name: {k: v.copy() for k, v in entry.saved.items()} for entry in parameters.entries},
    }


def load_state_dict(parameters: Parameters, state: Mapping[str, Any]) -> float | None:
    """Put a state into an optimizer for NumPy arrays, all of it or, if anything is wrong with it, nothing."""
    if not isinstance(state, Mapping) or state.get("optimizer") != OPTIMIZER:
        found = state.get("optimizer") if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"state: optimizer={found!r}: expected {OPTIMIZER!r}")
    if state.get("format") != FORMAT:
        raise ValueError(f"state: format={state.get('format')!r}: expected {FORMAT}")
    calls, skipped = _count(state, "iteration"), _count(state, "skipped_steps")
    product = _real(state, "momentum_product", 0.0, 1.0)
    lr = None if state.get("learning_rate") is None else _real(state, "learning_rate", 0.0, math.inf)

    entries = {entry.name: entry for entry in parameters.entries}
    arrays, accumulated = state.get("state"), state.get("accumulated", [])
    if not isinstance(arrays, Mapping):
        raise ValueError("state: 'state' is missing")
    _same_names("parameters", arrays, entries)
    accumulating = {name for name, entry in entries.items() if entry.accumulator is not None}
    if not isinstance(accumulated, (list, tuple)) or not all(isinstance(name, str) for name in accumulated):
        raise ValueError(f"accumulated: {accumulated!r:.99}: expected a list of names")
    if set(accumulated) - accumulating:
        raise ValueError(f"accumulated: {sorted(set(accumulated) - accumulating)}: no parameters with an accumulator")
    made, rounded = {}, []
    for name, entry in entries.items():
        made[name], exact = _converted(entry, arrays[name])
        rounded += [name] * (not exact)
    warn_of_rounding(rounded)

    for name, entry in entries.items():
        for slot, mine in entry.state.items():
            mine[...] = made[name][slot]
    now = parameters.counters.current
    now[CALLS], now[MOMENTUM_PRODUCT], now[SKIPPED] = calls, product, skipped
    now[SEEN:] = [name in set(accumulated) for name in entries]
    return lr


def _converted(entry: Parameter, given: Any) -> tuple[dict[str, Array], bool]:
    """A parameter's arrays, checked, with moments in its format; and whether these have the values of before."""
    mine, scales = entry.state, SCALES.values()
    kept = {slot: np.asarray(array) for slot, array in given.items()} if isinstance(given, Mapping) else given
    codes = isinstance(kept, Mapping) and SCALES["exp_avg"] in kept
    wide = {slot: array.dtype for slot, array in mine.items() if slot not in scales}
    wide |= dict.fromkeys(SCALES, np.dtype(np.float32)) if entry.exp_avg_scale is not None else {}
    expected = wide | CODES if codes and wide["exp_avg"] == np.float32 else wide
    _same_names(f"slots of {entry.name!r}", kept, expected)
    for slot in wide:
        array = kept[slot]
        if array.shape != mine[slot].shape:
            raise ValueError(f"{entry.name}.{slot}: shape {array.shape}, expected {mine[slot].shape}")
        if array.dtype != expected[slot]:
            raise ValueError(f"{entry.name}.{slot}: dtype {array.dtype}, expected {expected[slot]}")
        check_array(f"{entry.name}.{slot}", slot, array, mine[slot], codes)
    check_codes(entry.name, kept)
    return kept_moments(kept, entry.exp_avg_scale is not None, entry.order)


def _same_names(what: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    if not isinstance(given, Mapping):
        raise ValueError(f"{what}: expected a dict, got {type(given).__name__}")
    missing, unknown = sorted(set(expected) - set(given)), sorted(set(given) - set(expected))
    if missing or unknown:
        parts = [f"missing {missing}" if missing else "", f"not expected {unknown}" if unknown else ""]
        raise ValueError(f"{what}: {', '.join(filter(None, parts))}")


def _count(state: Mapping[str, Any], name: str) -> int:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={value!r}: expected an integer, {name} >= 0")
    return value


def _real(state: Mapping[str, Any], name: str, low: float, high: float) -> float:
    value = state.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high or math.isinf(value):
        raise ValueError(f"{name}={value!r}: expected {low:g} <= {name} <= {high:g}, finite")
    return float(value)
