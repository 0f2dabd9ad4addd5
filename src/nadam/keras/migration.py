"""From Keras's own Nadam, Adam and AdamW to this package's Nadam and back, state included."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import keras

from nadam.core.portable_settings import NO_ADAMS
from nadam.keras import portable
from nadam.keras.optimizer import EXCLUDED, OWN, Nadam

Optimizer = Any
_STOCK = (keras.optimizers.Nadam, keras.optimizers.Adam)  # of which AdamW is a subclass


def from_stock(optimizer: Optimizer, **settings: Any) -> Optimizer:
    """This package's Nadam in the place of Keras's own Nadam, Adam or AdamW, in the middle of training or before it.

    The momentum product, which Adam has not and Keras's Nadam loses in a LossScaleOptimizer, is that of so many updates
    with the settings of the new optimizer.

    Args:
        optimizer: A keras.optimizers.Nadam, Adam or AdamW, or a keras.optimizers.LossScaleOptimizer around one. Left
            as it is.
        **settings: Arguments of `nadam.keras.Nadam` that are to differ, or that Keras's own has not, such as
            ``momentum_decay``.

    Returns:
        A new optimizer for the same variables with the same settings and state; in a LossScaleOptimizer, if it was.

    Raises:
        TypeError: Another optimizer, or Adam with ``amsgrad``.
        ValueError: A setting that is unknown or out of its range, or one with which the state cannot go on.

    Example:
        >>> import keras
        >>> optimizer = from_stock(keras.optimizers.AdamW(0.01, weight_decay=0.1), bias_correction="adam")
        >>> type(optimizer).__module__, optimizer.weight_decay
        ('nadam.keras', 0.1)
    """
    return _converted(optimizer, _STOCK, Nadam, settings)


def to_stock(optimizer: Optimizer, cls: Any = keras.optimizers.Nadam) -> Optimizer:
    """Keras's own optimizer in the place of this package's; the reverse of `from_stock`.

    Args:
        optimizer: A Nadam of this package, or a keras.optimizers.LossScaleOptimizer around one. Left as it is.
        cls: Which of Keras's: keras.optimizers.Nadam, Adam or AdamW.

    Returns:
        A new optimizer for the same variables with the same settings and state.

    Raises:
        TypeError: Something else.
        ValueError: A setting that Keras's own has not: ``skip_nonfinite``, ``track_grad_norm``; for its Nadam also
            ``momentum_decay`` other than 1 and ``bias_correction`` other than "nadam".

    Example:
        >>> to_stock(Nadam(0.01)).beta_1
        0.9
    """
    if not (isinstance(cls, type) and issubclass(cls, _STOCK)):
        raise TypeError(f"cls={cls!r}: expected keras.optimizers.Nadam, Adam or AdamW")
    return _converted(optimizer, (Nadam,), cls, {})


def _converted(optimizer: Optimizer, sources: tuple[Any, ...], target: Any, settings: dict[str, Any]) -> Optimizer:
    made = _unbuilt(optimizer, sources, target, settings)
    if optimizer.built:
        made.build(list(optimizer._trainable_variables))
        # Without the settings, which are those of the new one already, but for what the user wants to differ.
        portable.restore(made, replace(portable.export(optimizer), groups=[]))
    return made


def _unbuilt(optimizer: Optimizer, sources: tuple[Any, ...], target: Any, settings: dict[str, Any]) -> Optimizer:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _unbuilt(optimizer.inner_optimizer, sources, target, settings)
        scale, steps = optimizer.initial_scale, optimizer.dynamic_growth_steps
        return keras.optimizers.LossScaleOptimizer(inner, scale, steps, name=optimizer.name)
    if not isinstance(optimizer, sources):
        known = " or ".join(f"{source.__module__}.{source.__qualname__}" for source in sources)
        raise TypeError(f"optimizer={optimizer!r}: expected a {known}")
    config = optimizer.get_config()
    if config.pop("amsgrad", False):
        raise TypeError("optimizer: amsgrad=True, whose state there is no place for")
    if any(issubclass(cls, keras.optimizers.Adam) for cls in (type(optimizer), target)):
        config = {name: value for name, value in config.items() if name not in {"name", *NO_ADAMS}}
    if target is not Nadam:  # whose moments are wide: codes become so
        config = {name: value for name, value in config.items() if name not in Nadam._options}
    unknown = sorted(OWN.keys() & config.keys())
    if target is not Nadam and unknown:
        raise ValueError(f"{unknown[0]}={config[unknown[0]]!r}: keras.optimizers.{target.__name__} has no such setting")
    config.pop(EXCLUDED, None)
    converted = target.from_config({**config, **settings})
    _copy_exclusions(optimizer, converted)
    return converted


def _copy_exclusions(source: Optimizer, target: Optimizer) -> None:
    """Carry over what does not decay: by variable where the source knows its variables, else by name as well."""
    if source.built:
        own = [v for v in source._trainable_variables if not source._use_weight_decay(v)]
        target.exclude_from_weight_decay(var_list=own)
    elif isinstance(source, Nadam):
        exclusion = source._runtime.exclusion
        target.exclude_from_weight_decay(exclusion.variables, exclusion.patterns)
    else:
        pattern = getattr(source, "_exclude_from_weight_decay_pattern", None)
        target.exclude_from_weight_decay(var_names=[pattern.pattern] if pattern else None)
        target._runtime.exclusion.keys |= getattr(source, "_exclude_from_weight_decay", set())
