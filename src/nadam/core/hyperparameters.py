"""What a user sets: every check and every message, once for all hosts."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from nadam.core.element import Flags
from nadam.core.gradient import Check
from nadam.core.scalars import Settings, momentum_product
from nadam.core.schedules import LearningRateSchedule

# name -> (allowed range, test). Comparisons with NaN are false, so NaN is out of every range.
RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "lr": ("0 <= {} < inf", lambda x: 0 <= x < math.inf),
    "beta1": ("0 <= {} < 1", lambda x: 0 <= x < 1),
    "beta2": ("0 <= {} < 1", lambda x: 0 <= x < 1),
    "eps": ("0 <= {} < inf", lambda x: 0 <= x < math.inf),
    "weight_decay": ("0 <= {} < inf, or None", lambda x: 0 <= x < math.inf),
    "clipnorm": ("{} > 0, or None", lambda x: x > 0),
    "clipvalue": ("{} > 0, or None", lambda x: x > 0),
    "global_clipnorm": ("{} > 0, or None", lambda x: x > 0),
    "ema_momentum": ("0 <= {} <= 1", lambda x: 0 <= x <= 1),
    "loss_scale_factor": ("0 < {} < inf, or None", lambda x: 0 < x < math.inf),
    "momentum_decay": ("{} >= 0", lambda x: x >= 0),
}
OPTIONAL = {"weight_decay", "clipnorm", "clipvalue", "global_clipnorm", "loss_scale_factor"}
BiasCorrection = Literal["nadam", "adam"]
BIAS_CORRECTIONS = get_args(BiasCorrection)
CLIPPING = ("clipnorm", "clipvalue", "global_clipnorm")


class Now(NamedTuple):
    """The hyperparameters that may differ from step to step, as they are at one step."""

    lr: float
    beta1: float
    beta2: float


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """What a user sets, checked. Numbers of any kind (NumPy scalars, 0-d arrays and tensors) become floats.

    Args:
        lr: Learning rate >= 0: a number, a schedule (called with the number of calls before this one) or a callable of
            no arguments.
        beta1: Decay rate of the first moment, in [0, 1); or a callable of no arguments.
        beta2: Decay rate of the second moment, likewise.
        eps: Added outside the square root, >= 0.
        weight_decay: Decoupled, unless coupled_weight_decay is set: the share lr * weight_decay of each parameter goes
            at each step. None for none.
        clipnorm: Largest norm of each gradient. At most one of the three clips is set.
        clipvalue: Largest magnitude of each element of a gradient.
        global_clipnorm: Largest norm of all gradients together.
        use_ema: Whether to keep a moving average of the parameters.
        ema_momentum: Share of the old average that is kept, in [0, 1].
        ema_overwrite_frequency: Every so many updates the parameters take their averages; None for never.
        loss_scale_factor: What the loss was multiplied by, > 0; gradients are divided by it.
        gradient_accumulation_steps: Calls per update, at least 2; None for an update at each call.
        momentum_decay: How fast the momentum warms up: 1 is Keras, 0.004 PyTorch, infinity optax.
        bias_correction: "nadam" divides the momentum term by one minus the momentum product of the next step, "adam" by
            that of this step, as the gradient term.
        skip_nonfinite: Whether a call with NaN, infinity or a value whose square overflows changes nothing.
        track_grad_norm: Whether an update measures the norm of all gradients also where nothing is clipped by it.
        coupled_weight_decay: Whether weight_decay times the parameter is instead added to the gradient (L2).
        maximize: Whether to go up the gradient.
        spelling: What the host calls these, where it calls them otherwise; for the messages.

    Raises:
        ValueError: A value out of its range, or two clips; it names the value and the range.
        TypeError: A value that is not a number.

    Example:
        >>> Hyperparameters(beta1=1.2, spelling={"beta1": "beta_1"})
        Traceback (most recent call last):
        ValueError: beta_1=1.2: expected 0 <= beta_1 < 1
    """

    lr: Any = 0.001
    beta1: Any = 0.9
    beta2: Any = 0.999
    eps: float = 1e-7
    weight_decay: float | None = None
    clipnorm: float | None = None
    clipvalue: float | None = None
    global_clipnorm: float | None = None
    use_ema: bool = False
    ema_momentum: float = 0.99
    ema_overwrite_frequency: int | None = None
    loss_scale_factor: float | None = None
    gradient_accumulation_steps: int | None = None
    momentum_decay: float = 1.0
    bias_correction: str = "nadam"
    skip_nonfinite: bool = False
    track_grad_norm: bool = False
    coupled_weight_decay: bool = False
    maximize: bool = False
    spelling: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)
    # What `at` gives when nothing is computed; it is asked at every step.
    _constant: Now | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in RANGES:
            value = getattr(self, name)
            if not (name in Now._fields and callable(value)):
                object.__setattr__(self, name, self._in_range(name, value))
        self._check_integer("ema_overwrite_frequency", 1)
        self._check_integer("gradient_accumulation_steps", 2)
        one_of(BIAS_CORRECTIONS, self._spelt("bias_correction"), self.bias_correction)
        clips = [name for name in CLIPPING if getattr(self, name) is not None]
        if len(clips) > 1:
            values = ", ".join(f"{self._spelt(name)}={getattr(self, name)!r}" for name in clips)
            raise ValueError(f"{values}: expected at most one of {', '.join(map(self._spelt, CLIPPING))}")
        constant = not any(callable(getattr(self, name)) for name in Now._fields)
        object.__setattr__(self, "_constant", Now(self.lr, self.beta1, self.beta2) if constant else None)

    def at(self, calls: int) -> Now:
        """The values to use at a step; schedules and callables are called, and what they give is checked."""
        if self._constant is not None:
            return self._constant
        return Now(*(self._in_range(name, current(getattr(self, name), calls)) for name in Now._fields))

    def settings(self, now: Now) -> Settings:
        """What an update takes of these, as they are at its step."""
        return Settings(
            *now,
            self.eps,
            self.momentum_decay,
            self.weight_decay or 0.0,
            self.coupled_weight_decay,
            self.bias_correction == "adam",
            math.inf if self.clipvalue is None else self.clipvalue,
            self.ema_momentum,
            self.ema_overwrite_frequency,
        )

    def product_after(self, updates: int) -> float:
        """The momentum product after so many updates, for state that does not keep it.

        Raises:
            ValueError: A function gives the first moment's decay rate.
        """
        if updates and callable(self.beta1):
            name = self._spelt("beta1")
            raise ValueError(f"{name}: it is computed at each step, so the missing momentum product cannot be computed")
        return momentum_product(updates, self.beta1, self.momentum_decay)

    @property
    def flags(self) -> Flags:
        """What an update does besides the rule."""
        return Flags(
            accumulated=self.gradient_accumulation_steps is not None,
            limited=self.clipvalue is not None,
            penalized=self.coupled_weight_decay and bool(self.weight_decay),
            averaged=self.use_ema,
        )

    @property
    def clips_by_norm(self) -> bool:
        """Whether gradients are clipped by their norms."""
        return self.clipnorm is not None or self.global_clipnorm is not None

    @property
    def measures_norm(self) -> bool:
        """Whether an update needs the norms of the gradients."""
        return self.clips_by_norm or self.track_grad_norm

    def check(self, must_be_finite: bool = False) -> Check:
        """What is asked of the values of the gradients before a call changes anything."""
        return Check.SQUARES_FINITE if self.skip_nonfinite else Check.FINITE if must_be_finite else Check.NOTHING

    def _spelt(self, name: str) -> str:
        return self.spelling.get(name, name)

    def _in_range(self, name: str, value: Any) -> Any:
        spelt = self._spelt(name)
        return None if value is None and name in OPTIONAL else in_range(name, as_number(spelt, value), spelt)

    def _check_integer(self, name: str, least: int) -> None:
        value, spelt = getattr(self, name), self._spelt(name)
        if value is None:
            return
        if isinstance(value, bool) or not hasattr(value, "__index__") or value.__index__() < least:
            raise ValueError(f"{spelt}={value!r}: expected an integer, {spelt} >= {least}, or None")
        object.__setattr__(self, name, value.__index__())


def in_range(name: str, number: float, spelt: str) -> float:
    """A number that is in its range."""
    allowed, test = RANGES[name]
    if not test(number):
        raise ValueError(f"{spelt}={number!r}: expected {allowed.format(spelt)}")
    return number


def one_of(allowed: tuple[str, ...], spelt: str, value: Any) -> str:
    """A word that is among the allowed ones."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{spelt}={value!r}: expected {' or '.join(map(repr, allowed))}")
    return value


def as_number(name: str, value: Any) -> float:
    """A real scalar of any kind as a float.

    Example:
        >>> as_number("lr", 1)
        1.0
    """
    if type(value) is float:  # as of a scheduler, at each step
        return value
    is_bool = isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
    if not (is_bool or isinstance(value, (str, bytes, complex))) and getattr(value, "shape", ()) == ():
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            pass
    raise TypeError(f"{name}={value!r}: expected a number")


def current(value: Any, calls: int) -> Any:
    """The value to use now: a schedule's for the number of calls, a callable's, or the value itself.

    Example:
        >>> current(lambda: 0.5, 3), current(lambda step: 1 / (step + 1), 3), current(0.1, 3)
        (0.5, 0.25, 0.1)
    """
    if not callable(value):
        return value
    return value(calls) if is_schedule(value) else value()


def is_schedule(value: Any) -> bool:
    """Whether a callable wants the number of calls: a LearningRateSchedule, or one that needs an argument.

    Example:
        >>> is_schedule(lambda step: 0.1), is_schedule(lambda: 0.1)
        (True, False)
    """
    if isinstance(value, LearningRateSchedule):
        return True
    if not callable(value):
        return False
    try:
        inspect.signature(value).bind()
    except TypeError:
        return True
    except ValueError:  # a builtin that does not tell
        return False
    return False
