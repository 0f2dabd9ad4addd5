"""From keras.optimizers.Nadam to this package's and back, state included."""

from __future__ import annotations

from typing import Any

import keras

from nadam.keras.optimizer import EXCLUDED, OWN, Nadam
from nadam.keras.state import product_after

Optimizer = Any
_MOMENTS = ("_momentums", "_velocities", "_model_variables_moving_average", "_accumulated_gradients")


def from_stock(optimizer: Optimizer) -> Optimizer:
    """This package's Nadam in the place of a keras.optimizers.Nadam, in the middle of training or before it.

    The momentum product, which Keras loses in a LossScaleOptimizer, is computed anew.

    Args:
        optimizer: A keras.optimizers.Nadam, or a keras.optimizers.LossScaleOptimizer around one. Left as it is.

    Returns:
        A new optimizer for the same variables with the same settings and state; in a LossScaleOptimizer, if it was.

    Raises:
        TypeError: Something else.

    Example:
        >>> import keras
        >>> optimizer = from_stock(keras.optimizers.Nadam(0.01, use_ema=True))
        >>> type(optimizer).__module__, optimizer.use_ema
        ('nadam.keras', True)
    """
    return _converted(optimizer, keras.optimizers.Nadam, Nadam)


def to_stock(optimizer: Optimizer) -> Optimizer:
    """A keras.optimizers.Nadam in the place of this package's; the reverse of `from_stock`.

    Args:
        optimizer: A Nadam of this package, or a keras.optimizers.LossScaleOptimizer around one. Left as it is.

    Returns:
        A new optimizer for the same variables with the same settings and state.

    Raises:
        TypeError: Something else.
        ValueError: A setting that Keras's own has not: ``momentum_decay`` other than 1, ``bias_correction``
            other than "nadam", ``skip_nonfinite``, ``track_grad_norm``.

    Example:
        >>> to_stock(Nadam(0.01)).beta_1
        0.9
    """
    return _converted(optimizer, Nadam, keras.optimizers.Nadam)


def _converted(optimizer: Optimizer, source: Any, target: Any) -> Optimizer:
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        inner = _converted(optimizer.inner_optimizer, source, target)
        scale, steps = optimizer.initial_scale, optimizer.dynamic_growth_steps
        outer = keras.optimizers.LossScaleOptimizer(inner, scale, steps, name=optimizer.name)
        if optimizer.built:
            outer.build(optimizer._trainable_variables)
            outer.step_counter.assign(optimizer.step_counter)
            outer.dynamic_scale.assign(optimizer.dynamic_scale)
            _copy_state(optimizer.inner_optimizer, inner)
        return outer
    if not isinstance(optimizer, source):
        raise TypeError(f"optimizer={optimizer!r}: expected a {source.__module__}.{source.__qualname__}")
    config = optimizer.get_config()
    unknown = sorted(OWN.keys() & config.keys())
    if target is not Nadam and unknown:
        raise ValueError(f"{unknown[0]}={config[unknown[0]]!r}: keras.optimizers.Nadam has no such setting")
    config.pop(EXCLUDED, None)
    converted = target.from_config(config)
    _copy_exclusions(optimizer, converted)
    if optimizer.built:
        converted.build(list(optimizer._trainable_variables))
        _copy_state(optimizer, converted)
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


def _copy_state(source: Optimizer, target: Optimizer) -> None:
    target._iterations.assign(source._iterations)
    for name in _MOMENTS:
        for old, new in zip(getattr(source, name, []), getattr(target, name, []), strict=True):
            if new is not None:
                new.assign(keras.ops.cast(keras.ops.copy(old.value), new.dtype))
    product = source._u_product.value
    if isinstance(target, Nadam) and not callable(target.beta_1):
        product = product_after(target, int(source._iterations))
    target._u_product.assign(product)
