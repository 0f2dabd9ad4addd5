"""The mathematics of a step for any library of arrays: NumPy, jax.numpy, torch, keras.ops."""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from nadam.core import gradient, scalars
from nadam.core.dtypes import SMALLEST_NORMAL
from nadam.core.rebind import bind_element, bind_scalars, rebind


class Mathematics(NamedTuple):
    """The functions of a step on the arrays of one library; they give new arrays.

    The first four are elementwise, and so is what ``element`` gives of a `element.stored`; the others take and give
    scalars, traced or not.
    """

    update: Callable[..., Any]
    clip_by_value: Callable[..., Any]
    coupled: Callable[..., Any]
    average: Callable[..., Any]
    element: Callable[..., Any]
    coefficients: Callable[..., Any]
    averaging: Callable[..., Any]
    clamp_eps: Callable[..., Any]
    scalars: Callable[..., Any]
    clip_factor: Callable[..., Any]
    global_clip_factor: Callable[..., Any]


@cache
def mathematics(xp: Any) -> Mathematics:
    """The functions of a step with an array library's ``sqrt``, ``log``, ``expm1`` and ``where``.

    Example:
        >>> import numpy as np
        >>> mathematics(np).clip_by_value(np.array([3.0, np.nan, -0.5]), 1.0).tolist()
        [1.0, nan, -0.5]
    """

    def log(x: Any) -> Any:
        return scalars.log(x) if isinstance(x, float) else xp.log(x)  # a constant's, in float64

    def where(condition: Any, yes: Any, no: Any) -> Any:
        return scalars.where(condition, yes, no) if isinstance(condition, bool) else xp.where(condition, yes, no)

    # Not the library's own, of which not all pass a NaN on.
    def minimum(value: Any, bound: Any) -> Any:
        return where(bound < value, bound, value)

    def maximum(value: Any, bound: Any) -> Any:
        return where(bound > value, bound, value)

    clip_factor = rebind(gradient.clip_factor, minimum=minimum, maximum=maximum, TINY=SMALLEST_NORMAL["float32"])
    return Mathematics(
        **bind_element(rebind, sqrt=xp.sqrt, minimum=minimum, maximum=maximum, where=where),
        **bind_scalars(rebind, where=where, maximum=maximum, sqrt=xp.sqrt, expm1=xp.expm1, log=log),
        clip_factor=clip_factor,
        global_clip_factor=rebind(gradient.global_clip_factor, clip_factor=clip_factor),
    )
