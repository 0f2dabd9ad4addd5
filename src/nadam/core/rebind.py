"""One function, several compilers: a copy of a function whose global names mean something else."""

from collections.abc import Callable
from types import FunctionType
from typing import Any

from nadam.core import element, gradient, rule, scalars

Compile = Callable[..., Any]  # (function, **global names) -> what the compiler makes of it


def rebind(function: Callable[..., Any], **names: Any) -> FunctionType:
    """A copy of a function that uses only its arguments and global names, which looks the latter up in ``names``.

    Example:
        >>> import numpy as np
        >>> update = rebind(rule.update, sqrt=np.sqrt)
        >>> update(np.ones(2), np.ones(2), 0.0, 0.0, 0.0, 1.0, 1.0, 0.5, 0.0, 0.0)[0].tolist()
        [0.5, 0.5]
    """
    assert isinstance(function, FunctionType)
    code = function.__code__
    # Numba cannot call with arguments that are only named; that they may be given by place too harms nobody.
    code = code.replace(co_argcount=code.co_argcount + code.co_kwonlyargcount, co_kwonlyargcount=0)
    copy = FunctionType(code, names, function.__name__)
    copy.__module__ = __name__  # Numba names what it compiles after the module
    return copy


def bind_element(compile: Compile, *, sqrt: Any, minimum: Any, maximum: Any, where: Any) -> dict[str, Any]:
    """The functions of an element by name, compiled; ``element`` is a function of the `element.stored` to use."""
    names = {
        "update": compile(rule.update, sqrt=sqrt),
        "clip_by_value": compile(gradient.clip_by_value, minimum=minimum, maximum=maximum),
        "coupled": compile(gradient.coupled),
        "average": compile(element.average),
    }
    return {**names, "element": lambda stored: compile(element.element, **names, where=where, stored=stored)}


def bind_scalars(
    compile: Compile, *, warmup: Any = scalars.MOMENTUM_WARMUP, where: Any, maximum: Any, **names: Any
) -> dict[str, Any]:
    """The functions that make a step's scalars by name, compiled; ``names`` are sqrt, expm1, log and the like."""
    momentum = compile(scalars.momentum, MOMENTUM_WARMUP=warmup, **names)
    made = {
        "coefficients": compile(
            scalars.coefficients, momentum=momentum, where=where, Coefficients=scalars.Coefficients, **names
        ),
        "averaging": compile(scalars.averaging, where=where),
        "clamp_eps": compile(scalars.clamp_eps, where=where, maximum=maximum),
    }
    return {**made, "scalars": compile(scalars.scalars, **made, where=where, Scalars=scalars.Scalars)}
