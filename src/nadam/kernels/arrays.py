"""The mathematics of a step for any library of arrays: NumPy, jax.numpy, torch, keras.ops."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nadam.core import average, coefficients, gradient, rule
from nadam.core.rebind import rebind


class Mathematics(NamedTuple):
    """The functions of a step on the arrays of one library; they give new arrays.

    The first four are elementwise; the others take and give scalars, traced or not.
    """

    update: Callable[..., Any]
    limit: Callable[..., Any]
    coupled: Callable[..., Any]
    average: Callable[..., Any]
    coefficients: Callable[..., Any]
    clamp_eps: Callable[..., Any]
    averaging: Callable[..., Any]
    clip_factor: Callable[..., Any]
    global_clip_factor: Callable[..., Any]


@cache
def mathematics(xp: Any) -> Mathematics:
    """The rule, the gradient's limits and the step's scalars, compiled for an array library.

    Args:
        xp: The library's namespace: ``sqrt``, ``log``, ``expm1`` and ``where``.

    Example:
        >>> mathematics(np).limit(np.array([3.0, np.nan, -0.5]), 1.0).tolist()
        [1.0, nan, -0.5]
    """

    def log(x: Any) -> Any:
        return coefficients.log(x) if isinstance(x, float) else xp.log(x)  # a constant's, in float64

    def where(condition: Any, yes: Any, no: Any) -> Any:
        return average.where(condition, yes, no) if isinstance(condition, bool) else xp.where(condition, yes, no)

    # Not the library's own, of which not all pass a NaN on.
    def minimum(value: Any, bound: Any) -> Any:
        return where(bound < value, bound, value)

    def maximum(value: Any, bound: Any) -> Any:
        return where(bound > value, bound, value)

    limits = {"minimum": minimum, "maximum": maximum, "TINY": float(np.finfo(np.float32).tiny)}
    clip_factor = rebind(gradient.clip_factor, **limits)
    momentum = rebind(coefficients.momentum, MOMENTUM_WARMUP=coefficients.MOMENTUM_WARMUP)
    scalars = {"momentum": momentum, "sqrt": xp.sqrt, "expm1": xp.expm1, "log": log}
    return Mathematics(
        update=rebind(rule.update, sqrt=xp.sqrt),
        limit=rebind(gradient.limit, **limits),
        coupled=rebind(gradient.coupled),
        average=rebind(average.average),
        coefficients=rebind(coefficients.coefficients, Coefficients=coefficients.Coefficients, **scalars),
        clamp_eps=rebind(coefficients.clamp_eps, where=where, maximum=maximum),
        averaging=rebind(average.averaging, where=xp.where, Averaging=average.Averaging),
        clip_factor=clip_factor,
        global_clip_factor=rebind(gradient.global_clip_factor, clip_factor=clip_factor),
    )
