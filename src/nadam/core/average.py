"""Exponential moving average of the parameters."""

from typing import Any, NamedTuple


class Averaging(NamedTuple):
    """What one update does to the average: scalars of this step."""

    momentum: Any  # what is kept of the old average: 0 on the first update, so that it starts at the parameter
    weight: Any  # 1 - momentum
    overwrite: Any  # whether the parameter then takes the average's value


def where(condition: Any, yes: Any, no: Any) -> Any:
    """One of two values; an array library has its own (rebind.py)."""
    return yes if condition else no


def averaging(ema_momentum: float, overwrite_frequency: int | None, step: Any) -> Averaging:
    """How the average moves at an update.

    Args:
        ema_momentum: Share of the old average that is kept, in [0, 1].
        overwrite_frequency: Every so many updates the parameter is set to its average; None for never.
        step: Number of this update, from 1.

    Example:
        >>> averaging(0.75, overwrite_frequency=2, step=2)
        Averaging(momentum=0.75, weight=0.25, overwrite=True)
    """
    momentum = where(step == 1, 0.0, ema_momentum)
    return Averaging(momentum, 1.0 - momentum, overwrite_frequency is not None and step % overwrite_frequency == 0)


def average(ema: Any, param: Any, momentum: Any, weight: Any) -> Any:
    """The new average, ``momentum * ema + weight * param``; compiled into the pass like the rule.

    Example:
        >>> average(1.0, 2.0, 0.75, 0.25)
        1.25
    """
    return momentum * ema + weight * param
