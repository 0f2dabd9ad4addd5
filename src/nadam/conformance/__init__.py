"""Which Nadam is it? Trajectories of the four members of the family, and a comparison of any implementation with them.

    python -m nadam.conformance my_module:make

Implementations of Nadam differ in the schedule of momentum and in the bias correction (docs/which.md). This says which
of the four one is, or where it first departs from the nearest. `make` takes the settings of a case as keyword
arguments and returns a fresh optimizer: a function of parameter and gradient, NumPy arrays of float64 of one shape
`(3,)`, that returns the new parameter in float64 or float32 and is called once for each step:

    def make(lr, beta1, beta2, eps, weight_decay=0.0, coupled_weight_decay=0.0):
        ...  # moments, step counter

        def step(param, grad):
            ...
            return param

        return step

`weight_decay` is decoupled (AdamW's), `coupled_weight_decay` adds to the gradient (L2). The cases of either are left
out where `make` has no argument of that name; the other four arguments are required.

The numbers are in `trajectories.json`, for implementations in other languages too: docs/conformance.md has the format.
"""

import inspect
import json
import math
from collections.abc import Callable, Mapping
from importlib.resources import files
from typing import Any, NamedTuple

import numpy as np

__all__ = ["LIMIT", "MEMBERS", "Departure", "Result", "identify", "load"]

MEMBERS = {
    "keras": "Keras's",
    "torch": "torch's",
    "optax": "optax's",
    "adam": "AlgoPerf's, timm's and TensorFlow 1's",
}
"""Member -> whose it is."""
LIMIT = 100
"""How many ulps of 1 the parameters may be off.

Rounding alone gives less than 20 of either format in 40 steps, and the nearest two members are 14,000 ulps of float32
apart.
"""
_ULP = {"float64": 2.0**-52, "float32": 2.0**-23}

Step = Callable[[Any, Any], Any]
Array = np.ndarray[Any, np.dtype[Any]]


class Departure(NamedTuple):
    """Where an implementation first leaves a member's trajectory.

    Attributes:
        step: From 1.
        element: Of the parameter, from 0.
        got: The implementation's value.
        expected: The member's.
    """

    step: int
    element: int
    got: float
    expected: float

    def __str__(self) -> str:
        return f"step {self.step}, param[{self.element}]: {self.got!r} instead of {self.expected!r}"


class Result(NamedTuple):
    """What an implementation is, by one member.

    Attributes:
        member: A key of `MEMBERS`: the one that it equals in most cases or follows for longest.
        dtype: The format of its parameters, float64 or float32.
        precision: The format in whose ulps it is compared. float32 for parameters in float64 too where they agree with
            the member to that only: something on their way is kept in single precision.
        ulps: Case -> how far it is off at most, in ulps of 1. Only cases that `make` offers.
        departures: Case -> where it first departs. Empty for a member of the family.
    """

    member: str
    dtype: str
    precision: str
    ulps: dict[str, float]
    departures: dict[str, Departure]

    def __str__(self) -> str:
        most = max((ulps for case, ulps in self.ulps.items() if case not in self.departures), default=0.0)
        precision = f"within {_above(most):g} ulps of {self.precision}"
        if self.dtype != self.precision:
            precision += f" (its parameters are {self.dtype})"
        if not self.departures:
            return f"{MEMBERS[self.member]}, {precision}"
        lines = [f"  case {case}: {departure}" for case, departure in self.departures.items()]
        if len(self.departures) == len(self.ulps):
            return "\n".join(["none of the four; departs from " + MEMBERS[self.member] + " at", *lines])
        agreed = ", ".join(case for case in self.ulps if case not in self.departures)
        return "\n".join([f"{MEMBERS[self.member]} in {agreed}, {precision}; departs at", *lines])


def load() -> dict[str, Any]:
    """The trajectories: `param`, `grads` and `cases`, as docs/conformance.md describes them."""
    found: dict[str, Any] = json.loads(files(__name__).joinpath("trajectories.json").read_text("utf-8"))
    return found


def identify(make: Callable[..., Step]) -> Result:
    """Run every case that an implementation offers and compare it with the four members.

    Args:
        make: As in the module's documentation.

    Returns:
        The member that it is, or the nearest one with the places at which it departs.

    Raises:
        TypeError: `make` lacks one of its four required arguments, or does not return a function.
        ValueError: A step returns another shape, another dtype than float64 or float32, or a number that is not finite.
        RuntimeError: `make` or a step raises; with its message, and the case and step.
    """
    data = load()
    offered = [case for case in data["cases"] if _offers(make, case["settings"])]
    runs = {case["name"]: _run(make, case, data) for case in offered}
    dtype = "float32" if any(run.dtype == np.float32 for run in runs.values()) else "float64"
    nearest = []
    for precision in ("float32",) if dtype == "float32" else ("float64", "float32"):
        results = [_compare(member, dtype, precision, runs, offered) for member in MEMBERS]
        nearest.append(max(results, key=_nearness))
    # The fewest departures; and at equal numbers of them the finer format.
    return min(nearest, key=lambda result: len(result.departures))


def _above(value: float) -> float:
    """Round up: to a whole number, or to one digit below 1."""
    unit = 10.0 ** math.floor(math.log10(value)) if 0 < value < 1 else 1.0
    return math.ceil(value / unit) * unit


def _nearness(result: Result) -> tuple[int, int, float]:
    """Agreement in many cases counts first, then in many steps, then how far off it is."""
    steps = sum(departure.step for departure in result.departures.values())
    return -len(result.departures), steps, -max(result.ulps.values())


def _offers(make: Callable[..., Step], settings: Mapping[str, float]) -> bool:
    """Whether `make` has the arguments of a case; the four of all cases are required."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except (TypeError, ValueError):
        raise TypeError(f"{make!r} is no function with a signature: expected make(lr, beta1, beta2, eps)") from None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return True
    missing = settings.keys() - {parameter.name for parameter in parameters}
    if missing - {"weight_decay", "coupled_weight_decay"}:
        raise TypeError(f"make has no argument {', '.join(sorted(missing))}: expected make(lr, beta1, beta2, eps)")
    return not missing


def _run(make: Callable[..., Step], case: Mapping[str, Any], data: Mapping[str, Any]) -> Array:
    """The parameters after each step of a case."""
    where, rows = f"case {case['name']}", []
    try:
        step = make(**case["settings"])
    except Exception as error:
        raise RuntimeError(f"{where}: make raised {type(error).__name__}: {error}") from error
    if not callable(step):
        raise TypeError(f"{where}: make returned {step!r}: expected a function of parameter and gradient")
    param = np.array(data["param"])
    for i, grad in enumerate(data["grads"], 1):
        try:
            param = np.array(step(param.astype(np.float64), np.array(grad)))
        except Exception as error:
            raise RuntimeError(f"{where}, step {i} raised {type(error).__name__}: {error}") from error
        if param.shape != (len(grad),) or param.dtype.name not in _ULP:
            raise ValueError(
                f"{where}, step {i} returned {param.dtype} of shape {param.shape}: "
                f"expected the new parameter, float64 or float32 of shape ({len(grad)},)"
            )
        if not np.isfinite(param).all():
            raise ValueError(f"{where}, step {i} returned {param.tolist()}: expected finite numbers")
        rows.append(param)
    return np.array(rows)


def _compare(member: str, dtype: str, precision: str, runs: Mapping[str, Array], cases: list[Any]) -> Result:
    """One member's distances and departures."""
    ulps, departures = {}, {}
    for case in cases:
        got, expected = runs[case["name"]].astype(np.float64), np.array(case[member])
        apart = np.abs(got - expected) / _ULP[precision]
        ulps[case["name"]] = float(apart.max())
        if (apart > LIMIT).any():
            i, j = (int(k) for k in np.argwhere(apart > LIMIT)[0])
            departures[case["name"]] = Departure(i + 1, j, float(got[i, j]), float(expected[i, j]))
    return Result(member, dtype, precision, ulps, departures)
