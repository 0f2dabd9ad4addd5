"""Where Keras's backends differ: a class each, looked up in a table. The one here computes eagerly by keras.ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib import import_module
from math import nan
from typing import Any

import keras

from nadam.core import traced
from nadam.core.clock import Clock
from nadam.core.exclusive import Exclusive
from nadam.core.gradient import Check
from nadam.core.hyperparameters import Hyperparameters
from nadam.core.step import StepReport
from nadam.keras.slots import Slot, checked_gradient

Optimizer = Any
# Backend -> module and class; any other (NumPy) does without what those know.
_CLASSES = {
    "torch": ("nadam.keras.on_torch", "TorchBackend"),
    "jax": ("nadam.keras.on_jax", "JaxBackend"),
    "tensorflow": ("nadam.keras.on_tensorflow", "TensorFlowBackend"),
}
# The report variable, where there is one, holds gradient norm, clip factor and, here, how many calls were skipped.
SKIPPED = 2
# What a copy of an optimizer has for itself.
OWN = ("exclusive", "clock", "unsettled", "on_cpu", "plans")


class Runtime:
    """What an optimizer has besides variables and settings. Not its variables, so Keras need not look into it."""

    def __init__(self) -> None:
        self.slots: tuple[Slot, ...] = ()
        self.overwritten = False  # whether there are variables that their gradient overwrites
        self.excluded: list[Any] = []
        self.excluded_keys: set[Any] = set()  # of variables that Keras's own optimizer was told to exclude
        self.excluded_patterns: list[str] = []
        self.pending: Any = None  # state that was loaded before the optimizer is built
        self.report: StepReport | None = None  # of the last eager step
        self.reported_at = (0, 0)  # calls and skipped ones after it
        self.window: tuple[int, set[int]] = (0, set())  # calls so far, and which had a gradient since the last update
        self._forget()

    def note(self, calls: int, report: StepReport) -> None:
        """Keep what an eager step did.

        Args:
            calls: So far, this one included.
            report: Of this call; numbers or 0-d arrays.
        """
        self.report, self.reported_at = report, (calls, report.skipped_steps)

    def seen(self, calls: int) -> set[int]:
        """Which variables had a gradient since the last update, where that is known of so many calls."""
        return self.window[1] if self.window[0] == calls else set()

    def note_seen(self, calls: int, members: Sequence[int], updated: bool) -> None:
        """After a call: these variables had a gradient in it.

        Args:
            calls: Before this one.
            members: Which.
            updated: Whether it was an update, after which a new window begins.
        """
        self.window = calls + 1, set() if updated else self.seen(calls) | set(members)

    def _forget(self) -> None:
        self.exclusive = Exclusive()
        self.clock: Clock | None = None
        self.unsettled: bool = False  # whether the clock may be ahead of the variables
        self.on_cpu = False
        self.plans: dict[Any, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        """For copies: without what belongs to this one's memory."""
        return {name: value for name, value in self.__dict__.items() if name not in OWN}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()


class Backend:
    """Eager arrays through keras.ops: no kernel, right on every device."""

    def building(self) -> AbstractContextManager[Any]:
        """Around the creation of variables."""
        return nullcontext()

    def near(self, optimizer: Optimizer, variable: Any) -> AbstractContextManager[Any]:
        """Around the creation of a variable's state: puts it on the same device."""
        return nullcontext()

    def initial_value(self, variable: Any) -> Callable[..., Any]:
        """An initializer that gives a variable's present value."""
        return lambda shape, dtype: keras.ops.cast(keras.ops.copy(getattr(variable, "value", variable)), dtype)

    def alone(self, optimizer: Optimizer, work: Callable[..., None], *args: Any) -> None:
        """Do a step, ``work(*args)``, while no other thread does one."""
        optimizer._runtime.exclusive.run("apply", work, *args)

    def settle(self, optimizer: Optimizer) -> None:
        """Before anyone looks at the variables."""

    def built(self, optimizer: Optimizer) -> None:
        """After the creation of all variables."""

    def finish(self, cls: type) -> None:
        """After the creation of the class."""

    def is_traced(self, value: Any) -> bool:
        """Whether a value is a tensor that is known only when a compiled program runs."""
        return False

    def number(self, value: Any) -> Any:
        """A scalar as a float; where it is traced, itself."""
        return float(value)

    def call_on_host(
        self, optimizer: Optimizer, function: Callable[[int], tuple[float, ...]], calls: Any, count: int
    ) -> Sequence[Any]:
        """What a Python function of the number of calls gives, at each step anew: ``count`` scalars."""
        return function(int(calls))

    def copy(self, optimizer: Optimizer, source: Any, target: Any) -> None:
        """Set a variable to another's value, in memory of its own."""
        target.assign(keras.ops.copy(source.value))

    def step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        """Do one call."""
        self.eager_step(optimizer, members, grads)

    def eager_step(self, optimizer: Optimizer, members: Sequence[int], grads: list[Any]) -> None:
        """One call with Python deciding what is done, as `core.step.step` does it."""
        h, xp, slots = optimizer._hyper, keras.ops, optimizer._runtime.slots
        calls = int(optimizer._iterations.value)
        now, unscale = optimizer._now(calls), 1.0 / (h.loss_scale_factor or 1.0)
        steps = h.gradient_accumulation_steps or 1
        updates, updating = calls // steps, (calls + 1) % steps == 0
        indices, grads = with_absent(h, slots, members, grads)
        seen = optimizer._runtime.seen(calls) if updating else set()
        grads = [
            xp.zeros_like(slots[i].variable) if g is None and i in seen else g
            for i, g in zip(indices, grads, strict=True)
        ]
        grads = [
            None if g is None else checked_gradient(slots[i].variable, g) for i, g in zip(indices, grads, strict=True)
        ]
        tensors = [values(slots[i]) for i in indices]
        present = [(slots[i], t, g) for i, t, g in zip(indices, tensors, grads, strict=True) if g is not None]
        skipped = self._skipped(optimizer)
        if h.skip_nonfinite:
            checked = [g for _, _, g in present], [t for _, t, _ in present]
            if not bool(traced.usable(xp, *checked, unscale, Check.SQUARES_FINITE)):
                optimizer._report.assign([0.0, 0.0, skipped + 1])
                report = StepReport(updates, float(now.lr), None, None, skipped + 1, skipped=True)
                optimizer._runtime.note(calls, report)
                return
        norm = factor = None
        if updating:
            product = optimizer._momentum_product.value
            traits = [traits_of(slots[i]) for i in indices]
            arguments = (updates, product, tensors, grads, traits)
            outcome = traced.update(xp, h, now, *arguments, unscale=unscale)
            for i, tensor in zip(indices, outcome.tensors, strict=True):
                assign(slots[i], tensor)
            self._clear(slots)
            optimizer._momentum_product.assign(outcome.momentum_product)
            norm, factor = (None if x is None else float(x) for x in (outcome.grad_norm, outcome.clip_factor))
        else:
            sums = traced.accumulate(xp, [t.accumulator for _, t, _ in present], [g for *_, g in present], unscale)
            for (slot, _, _), value in zip(present, sums, strict=True):
                slot.accumulator.assign(value)
        optimizer._iterations.assign_add(1)
        if steps > 1:
            optimizer._runtime.note_seen(calls, members, updating)
        if h.skip_nonfinite:
            optimizer._report.assign([norm or 0.0, factor or 0.0, skipped])
        optimizer._runtime.note(calls + 1, StepReport(updates + updating, float(now.lr), norm, factor, skipped))

    @staticmethod
    def _skipped(optimizer: Optimizer) -> int:
        return int(optimizer._report.numpy()[SKIPPED]) if optimizer.skip_nonfinite else 0

    @staticmethod
    def _clear(slots: Sequence[Slot]) -> None:
        for slot in slots:
            if slot.accumulator is not None and slot.exp_avg is not None:
                slot.accumulator.assign(keras.ops.zeros(slot.accumulator.shape, slot.accumulator.dtype))

    def last_step(self, optimizer: Optimizer) -> StepReport | None:
        """What the last call did, as far as it is known outside of a compiled step: by its own report, or variables."""
        if not optimizer.built:
            return None
        calls, skipped = int(optimizer._iterations.numpy()), self._skipped(optimizer)
        report = optimizer._runtime.report
        if report is None or optimizer._runtime.reported_at != (calls, skipped):
            if not calls and not skipped:
                return None
            norm, factor, _ = optimizer._report.numpy() if optimizer.skip_nonfinite else (0.0, 0.0, 0.0)
            rate = optimizer._learning_rate
            if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule):
                rate = rate(keras.ops.convert_to_tensor(max(calls - 1, 0)))
            elif not isinstance(rate, keras.Variable):
                rate = nan  # it is not this one's to call the user's function once more
            updates = calls // (optimizer.gradient_accumulation_steps or 1)
            report = StepReport(updates, rate, norm or None, factor or None, skipped)
        norm, factor = (None if x is None else float(x) for x in (report.grad_norm, report.clip_factor))
        if factor == 0.0 and not norm:  # what a compiled call gives that did not compute them
            norm = factor = None
        rate = report.learning_rate
        rate = float(rate.numpy() if isinstance(rate, keras.Variable) else rate)
        return StepReport(int(report.step), rate, norm, factor, skipped, report.skipped)


def with_absent(
    h: Hyperparameters, slots: Sequence[Slot], members: Sequence[int], grads: Sequence[Any]
) -> tuple[list[int], list[Any]]:
    """All variables that an update may move: with accumulation, also those without a gradient in this call."""
    if h.gradient_accumulation_steps is None or len(members) == len(slots):
        return list(members), list(grads)
    given = set(members)
    absent = [i for i, slot in enumerate(slots) if i not in given and slot.exp_avg is not None]
    return [*members, *absent], [*grads, *[None] * len(absent)]


def values(slot: Slot) -> traced.Tensor:
    """A variable's and its state's present values."""
    return traced.Tensor(*(None if v is None else getattr(v, "value", v) for v in slot[:5]))


def assign(slot: Slot, tensor: traced.Tensor) -> None:
    """Set a variable and its state; not the accumulator."""
    for variable, value in zip(slot[:4], tensor[:4], strict=True):
        if variable is not None:
            variable.assign(value)


def traits_of(slot: Slot) -> traced.Traits:
    """What is known of a variable before a step is compiled."""
    return traced.Traits(slot.decays, getattr(slot.variable, "constraint", None))


def _make() -> Backend:
    known = _CLASSES.get(keras.backend.backend())
    if known is None:
        return Backend()
    module, name = known
    made: Backend = getattr(import_module(module), name)()
    return made


backend = _make()
