"""What one element of a parameter goes through at an update, from its gradient to its average.

    gradient -> accumulator -> factor -> limit -> decay, moments, step -> store -> average -> overwrite

Every compiler takes it from here (rebind.py), around its own loads and stores.
"""

from typing import Any, NamedTuple

from nadam.core.gradient import clip_by_value, coupled
from nadam.core.rule import update
from nadam.core.scalars import where

Value = Any


class Flags(NamedTuple):
    """What an update does besides the rule; known before it is compiled."""

    accumulated: bool  # whether the accumulator is added to the gradient
    limited: bool  # whether each element of the gradient is limited
    penalized: bool  # whether weight decay is added to the gradient
    averaged: bool  # whether the moving average is kept


def stored(param: Value) -> Value:
    """What is read back of a parameter that is stored: rounded to its format, held to its constraint.

    Each compiler has its own; where nothing reads it back, the value itself.
    """
    return param


def average(ema: Value, param: Value, momentum: Any, weight: Any) -> Value:
    """The new average, ``momentum * ema + weight * param``.

    Example:
        >>> average(1.0, 2.0, 0.75, 0.25)
        1.25
    """
    return momentum * ema + weight * param


def element(
    param: Value,
    grad: Value,
    exp_avg: Value,
    exp_avg_sq: Value,
    ema: Value,
    accumulator: Value,
    factor: Any,
    decay: Any,
    s: Any,
    accumulated: bool,
    limited: bool,
    penalized: bool,
    averaged: bool,
) -> tuple[Value, Value, Value, Value]:
    """Advance one element.

    Args:
        param: Parameter, in the compute dtype.
        grad: Gradient as delivered, in the compute dtype.
        exp_avg: First moment.
        exp_avg_sq: Second moment.
        ema: Moving average of the parameter, where it is averaged.
        accumulator: Sum of the unscaled gradients before this one, where they are accumulated.
        factor: What multiplies the gradient: the mean of a window, unscaling, clipping by norm, the sign to maximize.
        decay: The parameter's, `Scalars.decay` or 0.
        s: Scalars of this update.
        accumulated: As of `Flags`, like the following.
        limited: Likewise.
        penalized: Likewise.
        averaged: Likewise.

    Returns:
        New (param, exp_avg, exp_avg_sq, ema); the accumulator is to be cleared.

    Example:
        >>> from nadam.core.scalars import Scalars
        >>> s = Scalars(0.5, 1.0, 0.1, 0.1, 0.0, 0.0, 1.0, 0.25, 0.5, 0.5, 0.0)
        >>> element(1.0, 1.0, 0.0, 0.0, 2.0, 0.0, 0.5, 0.0, s, False, True, False, True)
        (0.85, 0.125, 0.0625, 1.425)
    """
    # --8<-- [start:element]  (shown in docs/rule.md)
    if accumulated:
        grad = accumulator + grad * s.inv_scale
    grad = grad * factor
    if limited:
        grad = clip_by_value(grad, s.clipvalue)
    if penalized:
        grad = coupled(grad, param, decay)
        decay = decay * 0.0
    param, exp_avg, exp_avg_sq = update(
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        decay,
        s.exp_avg_weight,
        s.exp_avg_sq_weight,
        s.exp_avg_step,
        s.grad_step,
        s.eps,
    )
    param = stored(param)
    if averaged:
        ema = average(ema, param, s.ema_momentum, s.ema_weight)
        param = where(s.overwrite != 0, ema, param)
    return param, exp_avg, exp_avg_sq, ema
    # --8<-- [end:element]
