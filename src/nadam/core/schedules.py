"""Learning-rate schedules in float64: step number in, learning rate out."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, fields
from itertools import pairwise
from numbers import Integral
from typing import Any, Self

known_schedules: dict[tuple[str, str], type[LearningRateSchedule]] = {}  # (module, qualified name) -> class

# What each argument may be; a name means the same in every class.
_FLAGS = ("staircase", "cycle")
_POSITIVE = ("decay_steps", "first_decay_steps", "t_mul")
_NOT_NEGATIVE = ("warmup_steps", "decay_rate", "power", "m_mul")
_FINITE = ("initial_learning_rate", "end_learning_rate", "warmup_target", "alpha")


class LearningRateSchedule:
    """What a schedule is: ``schedule(step)`` gives the learning rate of that step (0 on the first).

    Subclasses define ``__call__`` and, to be saved, ``get_config``.

    Example:
        >>> class Halving(LearningRateSchedule):
        ...     def __call__(self, step):
        ...         return 0.1 / 2**step
        >>> Halving()(1)
        0.05
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known_schedules[cls.__module__, cls.__qualname__] = cls

    def __call__(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        raise NotImplementedError(f"{type(self).__name__} must define __call__(self, step)")

    def get_config(self) -> dict[str, Any]:
        """Return the constructor's arguments, as values that JSON can hold."""
        raise NotImplementedError(f"{type(self).__name__} cannot be saved unless it defines get_config(self)")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Return a schedule made from what ``get_config`` gave."""
        return cls(**config)


@dataclass(eq=False)
class _Configured(LearningRateSchedule):
    """The fields are the constructor, the config, the repr and what makes two schedules equal."""

    def __post_init__(self) -> None:
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            if name in _FLAGS:
                setattr(self, name, _flag(name, value))
            elif name == "warmup_target" and value is None:
                continue
            elif name in (*_POSITIVE, *_NOT_NEGATIVE, *_FINITE):
                setattr(self, name, _number(name, value))

    def __call__(self, step: int) -> float:
        return float(self._rate(float(step)))  # float() takes a NumPy scalar or a tensor of one number, too

    def _rate(self, step: float) -> float:
        raise NotImplementedError

    def get_config(self) -> dict[str, Any]:
        # A copy, lists too: changing a config leaves the schedule it came from alone.
        return {field.name: copy(getattr(self, field.name)) for field in fields(self)}

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Configured) or type(self) is not type(other):
            return NotImplemented
        return self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash(type(self))  # not of the values: they can be assigned to, and 1 == 1.0


@dataclass(eq=False)
class ExponentialDecay(_Configured):
    """Multiply by ``decay_rate`` every ``decay_steps``.

        lr = initial_learning_rate * decay_rate ** (step / decay_steps)

    Args:
        initial_learning_rate: Learning rate at step 0.
        decay_steps: Steps per factor of decay_rate, > 0.
        decay_rate: The factor, >= 0, no unit.
        staircase: Round the exponent down, so that lr changes only every decay_steps.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> ExponentialDecay(0.1, decay_steps=100, decay_rate=0.5)(200)
        0.025
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = "ExponentialDecay"

    def _rate(self, step: float) -> float:
        return self.initial_learning_rate * _power(self.decay_rate, _periods(self, step))


@dataclass(eq=False)
class InverseTimeDecay(_Configured):
    """Divide by a number that grows evenly with the step.

        lr = initial_learning_rate / (1 + decay_rate * step / decay_steps)

    Args:
        initial_learning_rate: Learning rate at step 0.
        decay_steps: Steps in which the divisor grows by decay_rate, > 0.
        decay_rate: That growth, >= 0, no unit.
        staircase: Round step / decay_steps down.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> InverseTimeDecay(0.1, decay_steps=10, decay_rate=1.0)(30)
        0.025
    """

    initial_learning_rate: float
    decay_steps: float
    decay_rate: float
    staircase: bool = False
    name: str | None = "InverseTimeDecay"

    def _rate(self, step: float) -> float:
        return self.initial_learning_rate / (1.0 + self.decay_rate * _periods(self, step))


@dataclass(eq=False)
class PiecewiseConstantDecay(_Configured):
    """Hold one value up to and including each boundary, then the next.

        lr = values[number of boundaries < step]

    Args:
        boundaries: n steps, strictly increasing.
        values: n + 1 learning rates.

    Raises:
        ValueError: The lengths do not fit, the boundaries do not rise, or an element is not a finite number.

    Example:
        >>> schedule = PiecewiseConstantDecay([100, 200], [0.1, 0.05, 0.01])
        >>> [schedule(step) for step in (100, 101, 201)]
        [0.1, 0.05, 0.01]
    """

    boundaries: list[float]
    values: list[float]
    name: str | None = "PiecewiseConstant"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.boundaries = _numbers("boundaries", self.boundaries)
        self.values = _numbers("values", self.values)
        if len(self.values) != len(self.boundaries) + 1:
            expected = f"len(values) == len(boundaries) + 1 == {len(self.boundaries) + 1}"
            raise ValueError(f"values={self.values}: expected {expected}")
        if any(low >= high for low, high in pairwise(self.boundaries)):
            raise ValueError(f"boundaries={self.boundaries}: expected boundaries strictly increasing")

    def _rate(self, step: float) -> float:
        return self.values[bisect_left(self.boundaries, step)]


@dataclass(eq=False)
class PolynomialDecay(_Configured):
    """Go from one learning rate to another along a power of the steps left.

        lr = (initial_learning_rate - end_learning_rate) * (1 - step / length) ** power + end_learning_rate

    Args:
        initial_learning_rate: Learning rate at step 0.
        decay_steps: Steps until end_learning_rate, > 0: ``length``, and lr stays there afterwards.
        end_learning_rate: Learning rate at the end.
        power: Exponent, >= 0; 1 is a straight line.
        cycle: Let length be decay_steps * ceil(step / decay_steps) instead: past the end lr jumps up and
            decays again, from lower each time.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> PolynomialDecay(1.0, decay_steps=100, end_learning_rate=0.5)(50)
        0.75
    """

    initial_learning_rate: float
    decay_steps: float
    end_learning_rate: float = 0.0001
    power: float = 1.0
    cycle: bool = False
    name: str | None = "PolynomialDecay"

    def _rate(self, step: float) -> float:
        done = step / self.decay_steps
        if self.cycle:
            done /= max(math.ceil(done), 1)
        left = _power(1.0 - min(done, 1.0), self.power)
        return (self.initial_learning_rate - self.end_learning_rate) * left + self.end_learning_rate


@dataclass(eq=False)
class CosineDecay(_Configured):
    """Warm up along a straight line, then decay along half a cosine.

        lr = initial_learning_rate + (warmup_target - initial_learning_rate) * step / warmup_steps
        lr = peak * ((1 - alpha) * (1 + cos(pi * done)) / 2 + alpha)
        done = min((step - warmup_steps) / decay_steps, 1)

    Args:
        initial_learning_rate: Learning rate at step 0.
        decay_steps: Steps from the peak to the end, not counting the warm-up, > 0; lr stays there afterwards.
        alpha: Learning rate at the end, as a fraction of the peak.
        warmup_target: The peak. None: no warm-up, the peak is initial_learning_rate at step 0.
        warmup_steps: Steps to the peak, >= 0; 0 starts at it. Above 0 only with a warmup_target.

    Raises:
        ValueError: An argument is out of range, or there are warmup_steps and no warmup_target.

    Example:
        >>> schedule = CosineDecay(0.0, decay_steps=100, alpha=0.25, warmup_target=0.4, warmup_steps=10)
        >>> [schedule(step) for step in (0, 5, 10, 110)]
        [0.0, 0.2, 0.4, 0.1]

    Reference:
        Loshchilov and Hutter (2017), SGDR, equation 5; warm-up: Goyal et al. (2017), section 2.2.
    """

    initial_learning_rate: float
    decay_steps: float
    alpha: float = 0.0
    name: str | None = "CosineDecay"
    warmup_target: float | None = None
    warmup_steps: float = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_target is None and self.warmup_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps!r}: expected a warmup_target, the peak, with it")

    def _rate(self, step: float) -> float:
        start, peak, done = self.initial_learning_rate, self.warmup_target, step
        if peak is None:
            peak = start
        elif done < self.warmup_steps:
            return start + (peak - start) * (done / self.warmup_steps)
        else:
            done -= self.warmup_steps
        return peak * ((1.0 - self.alpha) * _half_cosine(min(done / self.decay_steps, 1.0)) + self.alpha)


@dataclass(eq=False)
class CosineDecayRestarts(_Configured):
    """Decay along half a cosine, again and again, each time ``t_mul`` times as long.

        length[i] = first_decay_steps * t_mul**i
        start[i]  = length[0] + ... + length[i - 1] <= step
        done      = (step - start[i]) / length[i]
        lr = initial_learning_rate * ((1 - alpha) * m_mul**i * (1 + cos(pi * done)) / 2 + alpha)

    With t_mul < 1 the restarts crowd together before first_decay_steps / (1 - t_mul); from there on lr stays
    at its minimum.

    Args:
        initial_learning_rate: Learning rate at step 0.
        first_decay_steps: Steps until the first restart, > 0.
        t_mul: Length of a decay over that of the one before, > 0.
        m_mul: Height of a decay (above the minimum) over that of the one before, >= 0.
        alpha: Smallest learning rate, as a fraction of initial_learning_rate.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> schedule = CosineDecayRestarts(0.4, first_decay_steps=10, t_mul=2.0, m_mul=0.5)
        >>> [round(schedule(step), 12) for step in (0, 5, 10, 20, 30)]
        [0.4, 0.2, 0.2, 0.1, 0.1]

    Reference:
        Loshchilov and Hutter (2017), SGDR.
    """

    initial_learning_rate: float
    first_decay_steps: float
    t_mul: float = 2.0
    m_mul: float = 1.0
    alpha: float = 0.0
    name: str | None = "SGDRDecay"

    def _rate(self, step: float) -> float:
        periods, growth = step / self.first_decay_steps, self.t_mul - 1.0
        if growth == 0.0:
            restarts = math.floor(periods)
            done = periods - restarts
        elif 1.0 + periods * growth < 1e-9:  # t_mul**restarts nears 0
            return self.initial_learning_rate * self.alpha
        else:
            # At a restart the quotient is whole give or take some ulps; 1e-11 puts it on the far side.
            restarts = math.floor(math.log1p(periods * (1.0 + 1e-11) * growth) / math.log(self.t_mul))
            length = math.pow(self.t_mul, restarts)
            done = (periods - (length - 1.0) / growth) / length
        height = _power(self.m_mul, restarts) * _half_cosine(done)
        return self.initial_learning_rate * ((1.0 - self.alpha) * height + self.alpha)


def _periods(schedule: ExponentialDecay | InverseTimeDecay, step: float) -> float:
    periods = step / schedule.decay_steps
    return math.floor(periods) if schedule.staircase else periods


def _half_cosine(done: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _power(base: float, exponent: float) -> float:
    try:
        return math.pow(base, exponent)
    except OverflowError:  # Python raises where arrays give inf
        return math.inf


def _flag(name: str, value: Any) -> bool:
    if value not in (True, False):
        raise ValueError(f"{name}={value!r}: expected True or False")
    return bool(value)


def _number(name: str, value: Any) -> float:
    """Return value as a plain int or float (NumPy's are not JSON), or say what is wrong with it."""
    try:
        number = int(value) if isinstance(value, Integral) else float(value)
        finite = math.isfinite(number) and not isinstance(value, (str, bytes, bool))
    except (TypeError, ValueError, OverflowError):
        finite = False
    if not finite:
        raise ValueError(f"{name}={value!r}: expected a finite number")
    if name in _POSITIVE and number <= 0:
        raise ValueError(f"{name}={value!r}: expected {name} > 0")
    if name in _NOT_NEGATIVE and number < 0:
        raise ValueError(f"{name}={value!r}: expected {name} >= 0")
    return number


def _numbers(name: str, values: Any) -> list[float]:
    try:
        values = list(values)
    except TypeError:
        raise ValueError(f"{name}={values!r}: expected a list of numbers") from None
    return [_number(f"{name}[{i}]", value) for i, value in enumerate(values)]
