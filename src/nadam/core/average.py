"""Exponential moving average of the parameters."""

from typing import Any, NamedTuple


class Averaging(NamedTuple):
    """What one update does to the average: scalars of this step."""

    momentum: float  # what is kept of the old average: 0 on the first update, so that it starts at the parameter
    weight: float  # 1 - momentum
    overwrite: bool  # whether the parameter then takes the average's value


def averaging(ema_momentum: float, overwrite_frequency: int | None, step: int) -> Averaging:
    """How the average moves at an update.

    Args:
        ema_momentum: Share of the old average that is kept, in [0, 1].
        overwrite_frequency: Every so many updates the parameter is set to its average; None for never.
        step: Number of this update, from 1.

    Example:
        >>> averaging(0.75, overwrite_frequency=2, step=2)
        Averaging(momentum=0.75, weight=0.25, overwrite=True)
    """
    momentum = 0.0 if step == 1 else ema_momentum
    return Averaging(momentum, 1.0 - momentum, overwrite_frequency is not None and step % overwrite_frequency == 0)


def average(ema: Any, param: Any, momentum: Any, weight: Any) -> Any:
    """The new average, ``momentum * ema + weight * param``; compiled into the pass like the rule.

    Example:
        >>> average(1.0, 2.0, 0.75, 0.25)
        1.25
    """
    return momentum * ema + weight * param
