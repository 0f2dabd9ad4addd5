"""Wrong names of arguments and attributes: each is refused with the one that it may have been meant for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import wraps
from inspect import signature
from reprlib import repr as short
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

# What the hosts and other libraries call the same thing.
_ALIKE = (
    ("lr", "learning_rate", "step_size", "alpha", "eta"),
    ("betas", "beta_1", "beta1", "b1", "momentum"),
    ("betas", "beta_2", "beta2", "b2"),
    ("eps", "epsilon"),
    ("weight_decay", "wd", "decay", "l2"),
    ("momentum_decay", "psi", "schedule_decay"),
    ("global_clipnorm", "max_norm", "max_grad_norm", "clip_norm", "clip_grad_norm", "grad_clip", "gradient_clip_val"),
    ("clipvalue", "clip_value", "clip_grad_value"),
    ("gradient_accumulation_steps", "accumulation_steps", "accumulate_grad_batches", "every_k_schedule"),
    ("loss_scale_factor", "loss_scale"),
    ("use_ema", "ema"),
    ("ema_momentum", "ema_decay"),
    ("exp_avg_dtype", "mu_dtype"),
    ("exclude_from_weight_decay", "mask"),
)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about a wrong name: which of the known ones it may have been meant for, if any.

    Example:
        >>> did_you_mean("betas", ["beta_1", "beta_2", "epsilon"]), did_you_mean("epsilonn", ["epsilon"])
        (': did you mean beta_1, beta_2?', ': did you mean epsilon?')
    """
    known = list(known)
    same = {other for alike in _ALIKE if name in alike for other in alike}
    meant = [each for each in known if each in same] or get_close_matches(name, known, 1, 0.75)
    return f": did you mean {', '.join(meant)}?" if meant else ""


def known_arguments(error: type[Exception] = TypeError, otherwise: str = "") -> Callable[[F], F]:
    """Have an unknown argument of a function answered with those that there are.

    The signature stays without ``**kwargs``, so that type checkers see the same mistakes.

    Args:
        error: TypeError, as Python's own; or ValueError, as of Keras.
        otherwise: The end of the message where no other name is like it.
    """

    def decorate(function: F) -> F:
        known = [name for name in signature(function).parameters if name != "self"]
        owner = function.__qualname__.removesuffix(".__init__")

        def unknown(name: str, value: Any) -> Exception:
            end = did_you_mean(name, known) or otherwise
            if error is TypeError:
                return error(f"{owner}() got an unexpected keyword argument {name!r}{end}")
            return error(f"{name}={short(value)}: not an argument of {owner}{end}")

        def call(*args: Any, **kwargs: Any) -> Any:
            for name in kwargs:
                if name not in known:
                    raise unknown(name, kwargs[name])
            return function(*args, **kwargs)

        # With the global names of the function, by which doctest tells where it is from.
        copy = FunctionType(call.__code__, function.__globals__, closure=call.__closure__)
        return wraps(function)(copy)  # type: ignore[return-value]

    return decorate


class Refused:
    """An attribute that is not there; who sets or asks for it is told what there is instead."""

    def __init__(self, answer: str) -> None:
        self._answer = answer

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self._raise(instance)

    def __set__(self, instance: Any, value: Any) -> NoReturn:
        self._raise(instance, f"={short(value)}")

    def _raise(self, instance: Any, value: str = "") -> NoReturn:
        raise AttributeError(f"{self._name}{value}: not an attribute of {type(instance).__name__}: {self._answer}")


def refuse(cls: type, names: Iterable[str], answer: Callable[[str], str]) -> None:
    """Refuse attributes of a class by name, each with its answer."""
    for name in names:
        attribute = Refused(answer(name))
        attribute.__set_name__(cls, name)
        setattr(cls, name, attribute)


class Closed:
    """A class whose instances have the public attributes that it names in ``_own``, and no others.

    Its subclasses may have more.
    """

    if not TYPE_CHECKING:  # to which any name would be right then

        def __setattr__(self, name: str, value: Any) -> None:
            if name not in self.__dict__:  # where what a step sets is
                self._check_name(name, value)
            object.__setattr__(self, name, value)

    def _check_name(self, name: str, value: Any) -> None:
        cls = type(self)
        own = vars(cls).get("_own")
        if own is not None and name not in own and name[0] != "_" and not hasattr(cls, name):
            end = did_you_mean(name, [each for each in (*own, *dir(cls)) if each[0] != "_"])
            raise AttributeError(f"{name}={short(value)}: not an attribute of {cls.__name__}{end}")
