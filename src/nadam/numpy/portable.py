"""State of the optimizer for NumPy arrays in the form that moves between hosts, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nadam.core.counters import SEEN, SKIPPED
from nadam.core.portable import ParamState, PortableState, widened
from nadam.core.portable_settings import by_decay, settings_of
from nadam.numpy.loss_scale import LossScaleOptimizer
from nadam.numpy.optimizer import Nadam
from nadam.numpy.parameters import Parameters

Array = NDArray[Any]


def export(optimizer: Nadam | LossScaleOptimizer, params: Any = None) -> PortableState:
    """The state of an optimizer, its arrays not copied.

    Raises:
        ValueError: It is not built.
    """
    inner, scaling = _parts(optimizer)
    parameters = inner._built("nadam.checkpoint.save")
    counters, h = parameters.counters, inner._hyper
    steps = h.gradient_accumulation_steps or 1
    updates, product = counters.calls // steps, counters.momentum_product
    found = {
        entry.name: ParamState(updates, product, accumulated=bool(seen), **entry.saved)
        for entry, seen in zip(parameters.entries, counters.seen, strict=True)
    }
    names = list(found)
    return PortableState(
        optimizer=f"{type(optimizer).__module__}.{type(optimizer).__name__}",
        step=updates,
        names=names,
        params=found,
        momentum_product=product,
        position=counters.calls % steps,
        skipped_steps=counters.skipped,
        groups=[{**settings_of(*each), **inner._kept()} for each in by_decay(h, _decays(parameters))],
        loss_scale=None if scaling is None else {"scale": scaling.scale, "good_steps": scaling.good_steps},
        values=None if params is None else {name: widened(array) for name, array in _named(params).items()},
    )


def restore(optimizer: Nadam | LossScaleOptimizer, state: PortableState, params: Any = None) -> tuple[Any, Any]:
    """Put a state into an optimizer, and values into arrays; all of it or, if anything is wrong with it, nothing."""
    inner = _parts(optimizer)[0]
    inner._exclusive.run("nadam.checkpoint.load", _restore, optimizer, state, params)
    return optimizer, params


def _restore(optimizer: Nadam | LossScaleOptimizer, state: PortableState, params: Any) -> None:
    inner, scaling = _parts(optimizer)
    h = inner._hyper
    if params is None and not inner.built:
        raise ValueError("params: expected the arrays to train, since the optimizer is not built")
    parameters = inner._parameters or inner._prepared(params)
    shapes = {entry.name: entry.array.shape for entry in parameters.entries}
    arrays = {} if params is None else _named(params)
    state.check_fits(
        shapes,
        h,
        one_count=True,
        values=None if params is None else {name: array.shape for name, array in arrays.items()},
        loss_scale=scaling is not None,
    )
    trained = {entry.name: entry.array for entry in parameters.entries}
    state.check_complex({name for name, array in {**arrays, **trained}.items() if np.iscomplexobj(array)}, joint=False)
    for settings, members in by_decay(h, _decays(parameters)):
        state.check_settings(settings, members)
    product = state.product(h)
    state = _fitted(parameters, state)
    for name, array in arrays.items():
        if array is not trained.get(name, array):
            raise ValueError(f"params[{name!r}]: another array than the optimizer trains")
        if not array.flags.writeable:
            raise ValueError(f"params[{name!r}]: read-only")

    for name, array in arrays.items():
        array[...] = state.values[name]  # type: ignore[index]
    _put(parameters, state, product, h.gradient_accumulation_steps or 1)
    inner._parameters, inner._last_step = parameters, None
    rate = state.learning_rate(shapes)
    if rate is not None and not callable(h.lr):
        inner._hyper = replace(h, lr=rate)
    if scaling is not None:
        scaling.scale = float(state.loss_scale["scale"])  # type: ignore[index]
        scaling.good_steps = state.loss_scale["good_steps"]  # type: ignore[index]


def _fitted(parameters: Parameters, state: PortableState) -> PortableState:
    """A state with moments in the formats of these parameters."""
    codes = {entry.name: entry.order for entry in parameters.entries if entry.exp_avg_scale is not None}
    halves = [entry.name for entry in parameters.entries if entry.array.dtype.name == "bfloat16"]
    return state.fitted(codes, dict.fromkeys(halves, 0))


def _put(parameters: Parameters, state: PortableState, product: float, steps: int) -> None:
    for entry in parameters.entries:
        given = state.params.get(entry.name)
        for slot, mine in entry.state.items():
            array = None if given is None else getattr(given, slot)
            if array is not None:
                mine[...] = array
            elif slot == "accumulator" or given is None:  # a window that has just begun; a parameter never updated
                mine[...] = entry.array if slot == "ema" else 0.0
    counters = parameters.counters
    counters.start(state.step, product, state.position, steps)
    counters.current[SKIPPED] = state.skipped_steps
    seen = {name for name, each in state.params.items() if each.accumulated}
    counters.current[SEEN:] = [entry.name in seen for entry in parameters.entries]


def _decays(parameters: Parameters) -> dict[str, bool]:
    return {entry.name: entry.decays for entry in parameters.entries}


def _parts(optimizer: Nadam | LossScaleOptimizer) -> tuple[Nadam, Any]:
    """The Nadam, and the dynamic loss scaling, where there is any."""
    if isinstance(optimizer, LossScaleOptimizer):
        return optimizer.inner_optimizer, optimizer._scaling
    return optimizer, None


def _named(params: Any) -> dict[str, Array]:
    """Arrays by the names that an optimizer gives them."""
    if isinstance(params, Mapping):
        return {str(name): array for name, array in params.items()}
    return {str(i): np.asarray(array) for i, array in enumerate(params)}
