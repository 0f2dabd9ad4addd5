"""One function, several compilers: a copy of a function whose global names mean something else."""

from collections.abc import Callable
from types import FunctionType
from typing import Any


def rebind(function: Callable[..., Any], **names: Any) -> FunctionType:
    """A copy of ``function`` that looks its global names up in ``names``.

    Args:
        function: A Python function that uses only its arguments and global names.
        **names: What each global name stands for in the copy.

    Example:
        >>> from nadam.core import rule
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
