"""From the gradient as delivered to the one that the rule sees: unscale, accumulate, clip.

Unscaling and clipping by norm are one multiplier, ``grad_factor``, which the pass applies as it loads the gradient.
"""

import sys
from enum import Enum
from math import hypot
from typing import Any

from nadam.core.dtypes import LARGEST


class Check(Enum):
    """What is asked of the values of the gradients before a step."""

    NOTHING = 0
    FINITE = 1
    SQUARES_FINITE = 2


def largest_passing(dtype: str, check: Check) -> float:
    """The largest magnitude that passes a check, in the dtype that is computed in."""
    return float(LARGEST[dtype] ** (0.5 if check is Check.SQUARES_FINITE else 1.0))


# Of floats, these keep a NaN that comes first; each compiler has its own (rebind.py), which must too.
minimum, maximum = min, max
TINY = sys.float_info.min  # the smallest norm that may be divided by


def clip_by_value(grad: Any, clipvalue: Any) -> Any:
    """Each element held to [-clipvalue, clipvalue]; NaN stays NaN. Compiled into the pass like the rule.

    Example:
        >>> clip_by_value(3.0, 1.0), clip_by_value(-3.0, 1.0), clip_by_value(0.5, 1.0)
        (1.0, -1.0, 0.5)
    """
    return maximum(minimum(grad, clipvalue), -clipvalue)


def coupled(grad: Any, param: Any, weight_decay: Any) -> Any:
    """The gradient of a loss with an L2 penalty, ``grad + weight_decay * param``; compiled into the pass likewise.

    Example:
        >>> coupled(1.0, 2.0, 0.25)
        1.5
    """
    return grad + weight_decay * param


def clip_factor(norm: Any, clipnorm: float) -> Any:
    """The multiplier that brings a gradient of this norm to at most ``clipnorm``.

    Example:
        >>> clip_factor(norm=4.0, clipnorm=1.0), clip_factor(norm=0.5, clipnorm=1.0)
        (0.25, 1.0)
    """
    return minimum(clipnorm / maximum(norm, TINY), 1.0)


def global_clip_factor(norm: Any, clipnorm: float) -> Any:
    """The multiplier that brings all gradients together to a norm of at most ``clipnorm``.

    An infinity or NaN in one gradient makes every parameter NaN, as in Keras: silence would hide it.

    Example:
        >>> global_clip_factor(norm=float("inf"), clipnorm=1.0)
        nan
    """
    return clip_factor(norm, clipnorm) + (norm - norm)


def total_norm(norms: list[float]) -> float:
    """The norm of several tensors together, from the norm of each; no square overflows.

    Example:
        >>> total_norm([3e200, 4e200]) / 1e200
        5.0
    """
    return hypot(*norms)
