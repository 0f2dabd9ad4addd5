"""The mathematics of a step for any library of arrays: NumPy, jax.numpy, torch, keras.ops."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from nadam.core import average, coefficients, element, gradient, rule, scalars
from nadam.core.rebind import rebind


class Mathematics(NamedTuple):
    """The functions of a step on the arrays of one library; they give new arrays.

    The first four are elementwise, and so is what ``element`` gives of a `element.stored`; the others take and give
    scalars, traced or not.
    """

    update: Callable[..., Any]
    limit: Callable[..., Any]
    coupled: Callable[..., Any]
    average: Callable[..., Any]
    element: Callable[..., Any]
    coefficients: Callable[..., Any]
    clamp_eps: Callable[..., Any]
    scalars: Callable[..., Any]
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
    names = {"momentum": momentum, "sqrt": xp.sqrt, "expm1": xp.expm1, "log": log}
    coefs = rebind(coefficients.coefficients, Coefficients=coefficients.Coefficients, **names)
    clamp_eps = rebind(coefficients.clamp_eps, where=where, maximum=maximum)
    averaging = rebind(average.averaging, where=xp.where, Averaging=average.Averaging)
    made = {"coefficients": coefs, "averaging": averaging, "clamp_eps": clamp_eps, "where": where}
    own = {"update": rebind(rule.update, sqrt=xp.sqrt), "limit": rebind(gradient.limit, **limits)}
    own |= {"coupled": rebind(gradient.coupled), "average": rebind(average.average)}
    return Mathematics(
        **own,
        element=lambda stored: rebind(element.element, **own, where=where, stored=stored),
        coefficients=coefs,
        clamp_eps=clamp_eps,
        scalars=rebind(scalars.scalars, Scalars=scalars.Scalars, **made),
        clip_factor=clip_factor,
        global_clip_factor=rebind(gradient.global_clip_factor, clip_factor=clip_factor),
    )
