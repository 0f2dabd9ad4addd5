"""The rule for any library of arrays: NumPy, jax.numpy, torch, keras.ops."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from nadam.core import average, gradient, rule
from nadam.core.rebind import rebind


class Mathematics(NamedTuple):
    """The elementwise functions of a step, on the arrays of one library; they give new arrays."""

    update: Callable[..., Any]
    limit: Callable[..., Any]
    average: Callable[..., Any]


@cache
def mathematics(xp: Any) -> Mathematics:
    """The rule, compiled for an array library.

    Args:
        xp: The library's namespace: ``sqrt``, and ``minimum`` and ``maximum`` that pass NaN on.

    Example:
        >>> import numpy as np
        >>> mathematics(np).limit(np.array([3.0, np.nan, -0.5]), 1.0).tolist()
        [1.0, nan, -0.5]
    """
    return Mathematics(
        update=rebind(rule.update, sqrt=xp.sqrt),
        limit=rebind(gradient.limit, minimum=xp.minimum, maximum=xp.maximum),
        average=rebind(average.average),
    )
