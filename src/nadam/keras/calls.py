"""What a call is given: gradients matched with variables, and the hyperparameters of this step."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from math import inf, nan
from operator import is_
from typing import Any

import keras

from nadam.core.hyperparameters import Now, current
from nadam.keras.backends import backend
from nadam.keras.slots import checked_gradient, path_of

Optimizer = Any


def paired(optimizer: Optimizer, grads: list[Any], variables: Sequence[Any] | None) -> tuple[Sequence[int], list[Any]]:
    """Which of the optimizer's variables have a gradient, and their gradients."""
    if not optimizer.built:
        raise ValueError("trainable_variables: expected the variables to train, or call build() before")
    known = optimizer._trainable_variables
    variables = known if variables is None else list(variables)
    if len(grads) != len(variables):
        raise ValueError(f"grads: {len(grads)} gradients, expected one for each of {len(variables)} variables")
    members: Sequence[int] = range(len(variables))
    if len(variables) != len(known) or not all(map(is_, variables, known)):
        optimizer._check_variables_are_known(variables)
        members = [optimizer._get_variable_index(variable) for variable in variables]
        if len(set(members)) != len(members):
            raise ValueError("trainable_variables: the same variable twice")
    if any(map(partial(is_, None), grads)):
        return _present(optimizer, members, grads)
    return members, grads


def _present(optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> tuple[list[int], list[Any]]:
    """The variables that have a gradient, and their gradients; a warning, as Keras gives it, for the others."""
    pairs = list(zip(members, grads, strict=True))
    present = [(i, grad) for i, grad in pairs if grad is not None]
    if not present:
        raise ValueError("grads: no gradient for any variable")
    missing = [path_of(optimizer._trainable_variables[i]) for i, grad in pairs if grad is None]
    warnings.warn(
        f"Gradients do not exist for variables {missing} when minimizing the loss. If using `model.compile()`, did "
        "you forget to provide a `loss` argument?",
        stacklevel=4,
    )
    return [i for i, _ in present], [grad for _, grad in present]


def step_and_overwrite(optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
    """A step where gradients overwrite some variables (float8 scales): these come last, since the step may raise.

    With accumulation such a variable takes the largest gradient of its window, as in Keras.
    """
    slots, steps = optimizer._runtime.slots, optimizer.gradient_accumulation_steps
    pairs = list(zip(members, grads, strict=True))
    trained = [(i, grad) for i, grad in pairs if slots[i].exp_avg is not None]
    others = [(slots[i], checked_gradient(slots[i].variable, g)) for i, g in pairs if slots[i].exp_avg is None]
    before = keras.ops.copy(optimizer._iterations.value)
    if trained:
        backend.step(optimizer, [i for i, _ in trained], [grad for _, grad in trained])
    else:
        optimizer._iterations.assign_add(1)
    after = keras.ops.convert_to_tensor(optimizer._iterations.value)
    for slot, grad in others:
        variable, accumulator = slot.variable, slot.accumulator
        largest = grad if steps is None else keras.ops.maximum(grad, accumulator.value)
        taken = after != before  # not where the step was skipped
        if steps is not None:
            kept = keras.ops.where(taken, largest, accumulator.value)
            taken = taken & (after % steps == 0)
            accumulator.assign(keras.ops.where(taken, keras.ops.zeros_like(kept), kept))
        variable.assign(keras.ops.where(taken, keras.ops.cast(largest, variable.dtype), variable.value))


def now(optimizer: Optimizer, calls: Any) -> Now:
    """What the call after so many ``calls`` uses: numbers where they are known, else scalars of the backend."""
    rate, h = optimizer._learning_rate, optimizer._hyper
    if isinstance(rate, keras.Variable):
        rate = backend.read(rate)
    elif isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
        rate = rate(calls)
    if backend.is_traced(rate):  # it cannot raise: out of its range it makes everything NaN, which is seen
        rate = keras.ops.where((rate >= 0) & (rate < inf), rate, nan)
    elif rate is not optimizer._learning_rate:
        rate = float(rate)
    asked = {"lr": rate, "beta1": h.beta1, "beta2": h.beta2}
    called = {name: value for name, value in asked.items() if callable(value)}
    if called:

        def on_host(count: int) -> tuple[float, ...]:
            return tuple(h._in_range(name, current(value, count)) for name, value in called.items())

        asked.update(zip(called, backend.call_on_host(optimizer, on_host, calls, len(called)), strict=True))
    if isinstance(asked["lr"], float):
        h._in_range("lr", asked["lr"])
    return Now(**asked)
