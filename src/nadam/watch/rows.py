"""From the report of a step to a row of numbers, every so many steps; where asked for, with norms of each tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from nadam.core.step import StepReport

Row = dict[str, int | float | str | None]
"""Column -> value of one step, None where there is none."""
Writer = Callable[[Row], object]
"""What takes rows: `CSV`, `TensorBoard` or any function."""

NORMS = ("grad_norm", "param_norm", "update_norm")
WRAPPED = ("optimizer", "inner_optimizer", "optim")  # how Accelerate, Keras and PyTorch call what they wrap


def row(report: Any) -> Row:
    """What a step did, in numbers of Python.

    Args:
        report: ``last_step`` of any of the optimizers, also one of arrays as in the state of `nadam.jax.fused`.

    Returns:
        ``step``, ``learning_rate``, ``grad_norm``, ``clip_factor``, ``skipped_steps`` and ``nonfinite_param``, as
        `StepReport` has them; None for what there is not.

    Example:
        >>> row(StepReport(3, 0.5, 2.0, 0.25, 0))["clip_factor"]
        0.25
    """
    report = report.read() if hasattr(report, "read") else report  # from a GPU, all at once
    norm, factor = (None if x is None else float(x) for x in (report.grad_norm, report.clip_factor))
    return {
        "step": int(report.step),
        "learning_rate": float(report.learning_rate),
        "grad_norm": norm,
        "clip_factor": factor,
        "skipped_steps": int(report.skipped_steps),
        "nonfinite_param": report.nonfinite_param,
    }


class Watch:
    """Writes a row every so many steps, and one for each step that was skipped.

    Args:
        optimizer: An optimizer of this package, or what a trainer has wrapped it in.
        write: Called with each row: a `CSV`, a `TensorBoard`, any function of a dict; or a list of these.
        every: Of how many calls of the optimizer's step one is written.
        params: Arrays or tensors by name, or pairs as of ``named_parameters()``: rows also have ``grad_norm/NAME``,
            ``param_norm/NAME`` and ``update_norm/NAME`` of each. Then `before_step` is to be called too, and a step
            that is written costs a copy of the parameters and several passes over them.

    Raises:
        TypeError: An optimizer that has no ``last_step``.
        ValueError: ``every`` is no integer >= 1.

    Example:
        >>> import nadam
        >>> weights, rows = {"w": np.ones(4)}, []
        >>> optimizer = nadam.Nadam(0.5, track_grad_norm=True)
        >>> watch = Watch(optimizer, rows.append, every=2)
        >>> for _ in range(4):
        ...     optimizer.apply({"w": np.ones(4)}, weights)
        ...     watch.after_step()
        >>> [(each["step"], each["grad_norm"]) for each in rows]
        [(2, 2.0), (4, 2.0)]
    """

    def __init__(self, optimizer: Any, write: Writer | Sequence[Writer], *, every: int = 1, params: Any = None) -> None:
        self._optimizer = unwrapped(optimizer)
        self._writers = writers_of(write)
        self._every, self._calls = checked_every(every), 0
        self._params: dict[str, Any] = dict(params or {})
        self._before: dict[str, Any] = {}

    @property
    def _is_due(self) -> bool:
        """Whether the step that comes next is one of those that are written in any case."""
        return (self._calls + 1) % self._every == 0

    def before_step(self) -> None:
        """Keep the parameters as they are, if the step that comes next is written with norms of each."""
        if self._params and self._is_due:
            self._before = {name: _copy(param) for name, param in self._params.items()}

    def after_step(self, grads: Mapping[str, Any] | None = None) -> None:
        """Write a row, if it is time for one or the step was skipped.

        Args:
            grads: Gradients by the parameters' names, where these do not have them as ``grad``.
        """
        due, report = self._is_due, self._optimizer.last_step
        self._calls += 1
        # One that is on a GPU is not read in between: that would wait for the device.
        if due or (isinstance(report, StepReport) and report.skipped):
            made = row(report) | dict.fromkeys(f"{norm}/{name}" for name in self._params for norm in NORMS)
            if due:
                made |= self._norms(grads or {})
            for write in self._writers:
                write(made)
        self._before = {}

    def _norms(self, grads: Mapping[str, Any]) -> Row:
        """Of each parameter the norms that can be known."""
        made: Row = {}
        for name, param in self._params.items():
            value, before = _values(param), self._before.get(name)
            grad = grads.get(name, getattr(getattr(param, "value", param), "grad", None))
            made[f"grad_norm/{name}"] = None if grad is None else _norm(_values(grad))
            made[f"param_norm/{name}"] = _norm(value)
            made[f"update_norm/{name}"] = None if before is None else _norm(value - before)
        return made


def unwrapped(optimizer: Any) -> Any:
    """The optimizer of this package in what a trainer has made of it."""
    found = optimizer
    while (inner := next((getattr(found, name) for name in WRAPPED if hasattr(found, name)), None)) is not None:
        found = inner
    if not hasattr(found, "last_step"):
        raise TypeError(f"optimizer: {type(found).__name__} has no last_step: expected an optimizer of nadam")
    return found


def writers_of(write: Writer | Sequence[Writer]) -> list[Writer]:
    """One or several functions that take rows, as a list."""
    found = [write] if callable(write) else list(write)
    for each in found:
        if not callable(each):
            raise TypeError(f"write: {type(each).__name__}, expected a function of a dict, as CSV(path) is one")
    return found


def checked_every(every: Any) -> int:
    """A number of steps, if it is one."""
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every={every!r}: expected an integer, every >= 1")
    return every


def _values(tensor: Any) -> Any:
    """A tensor of PyTorch without its graph; of others, of Keras's variables too, an array of NumPy."""
    tensor = getattr(tensor, "value", tensor)
    return tensor.detach() if hasattr(tensor, "detach") else np.asarray(tensor)


def _copy(tensor: Any) -> Any:
    values = _values(tensor)
    return values.clone() if hasattr(values, "clone") else values.copy()


def _norm(values: Any) -> float:
    """The norm of an array, taken in float64; of one that is split over processes, of the whole."""
    if not hasattr(values, "double"):
        return float(np.linalg.norm(np.abs(values).astype(np.float64).ravel()))
    norm = values.abs().double().norm()
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
