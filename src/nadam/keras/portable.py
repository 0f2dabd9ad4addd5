"""State of Keras's Nadam, Adam and AdamW, ours and Keras's own, in the form that moves between hosts, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from nadam.core.config import hyperparameters
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.portable import ParamState, PortableState, widened
from nadam.core.portable_settings import by_decay, settings_of
from nadam.keras.backends import SKIPPED, backend
from nadam.keras.optimizer import Nadam
from nadam.keras.slots import keeps_codes, path_of

Array = NDArray[Any]
Optimizer = Any
# Where Keras's optimizers, and ours, have the state of each variable.
SLOTS = {"exp_avg": "_momentums", "exp_avg_sq": "_velocities"}
SLOTS |= {"exp_avg_scale": "_momentum_scales", "exp_avg_sq_scale": "_velocity_scales"}
SLOTS |= {"ema": "_model_variables_moving_average", "accumulator": "_accumulated_gradients"}


def export(optimizer: Optimizer, params: Any = None) -> PortableState:
    """The state of a Nadam, of Keras's own Nadam, Adam or AdamW, or of a LossScaleOptimizer around one.

    Raises:
        ValueError: It is not built.
        TypeError: Another optimizer.
    """
    inner, scaling = _parts(optimizer)
    trained = _trained(inner, None)
    h, calls = _hyper(inner), int(keras.ops.convert_to_numpy(inner._iterations))
    steps = h.gradient_accumulation_steps or 1
    updates, position, product = calls // steps, calls % steps, _product(inner)
    seen = _seen(inner, calls) if position else set()
    paths = _paths(trained)
    found = {}
    for i, path in enumerate(paths):
        variables = {slot: kept[i] for slot, name in SLOTS.items() if (kept := getattr(inner, name, None))}
        if variables["exp_avg"] is not None:  # but of a variable that its gradient overwrites
            arrays = {slot: _array(v) for slot, v in variables.items() if v is not None}
            found[path] = ParamState(updates, product, accumulated=i in seen, **arrays)
    cls = type(optimizer)
    return PortableState(
        optimizer=f"{cls.__module__}.{cls.__qualname__}",
        step=updates,
        names=paths,
        params=found,
        momentum_product=product,
        position=position,
        skipped_steps=_skipped(inner),
        groups=[_settings(inner, *each) for each in by_decay(h, _decays(inner, trained))],
        loss_scale=None if scaling is None else _loss_scale(scaling),
        values=None if params is None else {path: _array(variable) for path, variable in _named(params).items()},
    )


def restore(optimizer: Optimizer, state: PortableState, params: Any = None) -> tuple[Any, Any]:
    """Put a state into an optimizer, and values into variables; all of it or, if anything is wrong with it, nothing."""
    inner, scaling = _parts(optimizer)
    h, named = _hyper(inner), {} if params is None else _named(params)
    trained = _trained(inner, params)
    paths = _paths(trained)
    shapes = dict(zip(paths, (tuple(variable.shape) for variable in trained), strict=True))
    values = None if params is None else {path: tuple(variable.shape) for path, variable in named.items()}
    state.check_fits(shapes, h, one_count=True, values=values, loss_scale=scaling is not None)
    state.check_complex((), joint=False)
    for settings, own in by_decay(h, _decays(inner, trained)):
        state.check_settings(settings, own, adam=_is_adam(inner))
    product, steps = state.product(h), h.gradient_accumulation_steps or 1
    by_path = dict(zip(paths, trained, strict=True))
    codes = {path: None for path, v in by_path.items() if isinstance(inner, Nadam) and keeps_codes(inner, v)}
    halves = [path for path, v in by_path.items() if keras.backend.standardize_dtype(v.dtype) == "bfloat16"]
    state = state.fitted(codes, dict.fromkeys(halves, 0))

    if not optimizer.built:
        optimizer.build(trained)
    for path, variable in named.items():
        variable.assign(state.values[path])  # type: ignore[index]
    for i, path in enumerate(paths):
        given = state.params.get(path)
        for slot, name in SLOTS.items():
            kept = getattr(inner, name, None)
            if not kept or kept[i] is None:
                continue
            array = None if given is None else getattr(given, slot)
            if array is None and (given is None or slot == "accumulator"):
                array = _array(trained[i]) if slot == "ema" else np.zeros(kept[i].shape)
            kept[i].assign(array)
    calls = state.step * steps + state.position
    inner._iterations.assign(calls)
    if hasattr(inner, "_u_product"):
        inner._u_product.assign(product)
    rate = state.learning_rate(paths)
    if rate is not None and isinstance(inner._learning_rate, keras.Variable):
        inner._learning_rate.assign(rate)
    if isinstance(inner, Nadam):
        if inner._report is not None:
            inner._report.assign([0.0, 0.0, state.skipped_steps])
        seen = {i for i, path in enumerate(paths) if path in state.params and state.params[path].accumulated}
        inner._runtime.window, inner._runtime.report = (calls, seen), None
    if scaling is not None:
        scaling.dynamic_scale.assign(state.loss_scale["scale"])  # type: ignore[index]
        scaling.step_counter.assign(state.loss_scale["good_steps"])  # type: ignore[index]
    return optimizer, params


def _parts(optimizer: Optimizer) -> tuple[Optimizer, Optimizer]:
    """The optimizer that has the moments, and the one that scales the loss, where there is one."""
    scaling = optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else None
    inner = optimizer if scaling is None else scaling.inner_optimizer
    if not isinstance(inner, (Nadam, keras.optimizers.Nadam, keras.optimizers.Adam, keras.optimizers.AdamW)):
        raise TypeError(f"optimizer: {type(inner).__qualname__}, expected Nadam, Adam or AdamW")
    if getattr(inner, "amsgrad", False):
        raise TypeError("optimizer: amsgrad=True, whose state there is no place for")
    return inner, scaling


def _is_adam(inner: Optimizer) -> bool:
    return isinstance(inner, keras.optimizers.Adam)


def _trained(inner: Optimizer, params: Any) -> list[Any]:
    """The variables that an optimizer trains; of one that is not built yet, those of a model, list or dict."""
    if inner.built:
        if isinstance(inner, Nadam):
            backend.sync_counters(inner)
        return list(inner._trainable_variables)
    if params is None:
        raise ValueError("nadam.checkpoint: the optimizer is not built yet: call build(variables), or load with params")
    return list(getattr(params, "trainable_variables", params.values() if isinstance(params, Mapping) else params))


def _hyper(inner: Optimizer) -> Hyperparameters:
    """The settings, with the learning rate as it is now."""
    rate = inner._learning_rate
    if isinstance(inner, Nadam):
        h: Hyperparameters = inner._hyper
    else:
        config = {
            name: getattr(inner, name)
            for name in inner.get_config()
            if name != "learning_rate" and hasattr(inner, name)
        }
        decay = 1.0 if isinstance(inner, keras.optimizers.Nadam) else inf
        h = hyperparameters({**config, "momentum_decay": decay})
    if not isinstance(rate, keras.Variable):
        return replace(h, lr=rate)
    now = float(keras.ops.convert_to_numpy(rate))
    # Which is kept in float32.
    return h if not callable(h.lr) and np.float32(h.lr) == np.float32(now) else replace(h, lr=now)


def _settings(inner: Optimizer, h: Hyperparameters, names: list[str]) -> dict[str, Any]:
    """An entry of `PortableState.groups`; of ours, with how it keeps its state."""
    found = settings_of(h, names, adam=_is_adam(inner))
    return {**found, **inner._kept()} if isinstance(inner, Nadam) else found


def _decays(inner: Optimizer, trained: list[Any]) -> dict[str, bool]:
    return dict(zip(_paths(trained), (bool(inner._use_weight_decay(each)) for each in trained), strict=True))


def _paths(trained: list[Any]) -> list[str]:
    """Names of variables; of several that have one path, all but the first get their number."""
    paths: dict[str, None] = {}
    for i, path in enumerate(map(path_of, trained)):
        paths[path if path not in paths else f"{path} ({i})"] = None
    return list(paths)


def _product(inner: Optimizer) -> float | None:
    """The momentum product; of Keras's own, which loses it in a LossScaleOptimizer, none."""
    return float(keras.ops.convert_to_numpy(inner._momentum_product)) if isinstance(inner, Nadam) else None


def _seen(inner: Optimizer, calls: int) -> set[int]:
    """Which variables had a gradient in this window; all, where that is not known."""
    everything = set(range(len(inner._trainable_variables)))
    return inner._runtime.seen(calls) or everything if isinstance(inner, Nadam) else everything


def _skipped(inner: Optimizer) -> int:
    report = getattr(inner, "_report", None)
    return 0 if report is None else int(keras.ops.convert_to_numpy(report)[SKIPPED])


def _loss_scale(scaling: Optimizer) -> dict[str, Any]:
    scale, steps = (keras.ops.convert_to_numpy(v) for v in (scaling.dynamic_scale, scaling.step_counter))
    return {"scale": float(scale), "good_steps": int(steps)}


def _named(params: Any) -> dict[str, Any]:
    """Variables by path: all weights of a model, or those of a list or dict."""
    listed = params.weights if hasattr(params, "weights") else params
    if isinstance(listed, Mapping):
        return dict(listed)
    named = {path_of(variable): variable for variable in listed}
    if len(named) < len(listed):
        raise ValueError("params: two variables of one path")
    return named


def _array(variable: Any) -> Array:
    return widened(keras.ops.convert_to_numpy(variable))
