"""State of the optimizer for NumPy arrays: what is in it, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.counters import CALLS, MOMENTUM_PRODUCT, SEEN, SKIPPED

if TYPE_CHECKING:
    from nadam.numpy.parameters import Parameters

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
        "state": {entry.name: {k: v.copy() for k, v in entry.state.items()} for entry in parameters.entries},
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
    for name, entry in entries.items():
        _same_names(f"slots of {name!r}", arrays[name], entry.state)
        for slot, mine in entry.state.items():
            _check_array(f"{name}.{slot}", np.asarray(arrays[name][slot]), mine, slot == "exp_avg_sq")

    for name, entry in entries.items():
        for slot, mine in entry.state.items():
            mine[...] = arrays[name][slot]
    now = parameters.counters.current
    now[CALLS], now[MOMENTUM_PRODUCT], now[SKIPPED] = calls, product, skipped
    now[SEEN:] = [name in set(accumulated) for name in entries]
    return lr


def _check_array(name: str, given: NDArray[Any], mine: NDArray[Any], squares: bool) -> None:
    if given.shape != mine.shape:
        raise ValueError(f"{name}: shape {given.shape}, expected {mine.shape}")
    if given.dtype != mine.dtype:
        raise ValueError(f"{name}: dtype {given.dtype}, expected {mine.dtype}")
    if not np.isfinite(given).all():
        raise ValueError(f"{name}: not all of its values are finite")
    if squares and given.size and min(given.real.min(), given.imag.min()) < 0:
        raise ValueError(f"{name}: a negative value in an average of squares")


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
